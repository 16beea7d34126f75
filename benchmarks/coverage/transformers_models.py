"""The models of transformers: architectures built from tiny configurations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.coverage.case import Built, Case

# Every configuration starts from these values; `...` in an override leaves one to the configuration.
TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
# What several of them share.
SSM = {"mamba_d_state": 4, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_chunk_size": 4}
MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
MLA = {
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
SPEECH = {
    "conv_dim": [16, 16],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}
IMAGE = {"image_size": 32, "patch_size": 8}
SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "num_hidden_layers": ...,
    "num_attention_heads": ...,
}
VIDEO = {"image_size": 16, "patch_size": 8, "num_frames": 4}
STAGES = {
    "image_size": 64,
    "num_hidden_layers": ...,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 2, 1],
    "num_attention_heads": [1, 2, 2, 4],
}


def tiny(name: str, *shared: dict[str, Any], shape: tuple[int, ...] = (), **own: Any) -> tuple[Any, ...]:
    """A model class, its configuration, and the shape of its input where it is not the usual one."""
    options: dict[str, Any] = {}
    for part in (*shared, own):
        options |= part
    return name, options, shape


MODELS = {
    "decoder": {
        "biogpt": tiny("BioGptForCausalLM"),
        "bitnet": tiny("BitNetForCausalLM"),
        "bloom": tiny("BloomForCausalLM"),
        "codegen": tiny("CodeGenForCausalLM", n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
        "cohere": tiny("CohereForCausalLM"),
        "cohere2": tiny("Cohere2ForCausalLM"),
        "ctrl": tiny("CTRLLMHeadModel", n_embd=32, dff=48, n_layer=2, n_head=4),
        "diffllama": tiny("DiffLlamaForCausalLM"),
        "exaone4": tiny("Exaone4ForCausalLM"),
        "falcon": tiny("FalconForCausalLM"),
        "gemma": tiny("GemmaForCausalLM", head_dim=8),
        "gemma2": tiny("Gemma2ForCausalLM", head_dim=8),
        "gemma3": tiny("Gemma3ForCausalLM", head_dim=8),
        "gemma3n": tiny(
            "Gemma3nForCausalLM",
            head_dim=8,
            vocab_size_per_layer_input=64,
            hidden_size_per_layer_input=8,
            num_kv_shared_layers=0,
            laurel_rank=4,
            intermediate_size=[48, 48],
            layer_types=["sliding_attention", "full_attention"],
            activation_sparsity_pattern=[0.5, 0.0],
        ),
        "glm4": tiny("Glm4ForCausalLM", head_dim=8),
        "gpt-bigcode": tiny("GPTBigCodeForCausalLM"),
        "gpt-neo": tiny("GPTNeoForCausalLM", attention_types=[[["global", "local"], 1]], window_size=4),
        "gpt-neox": tiny("GPTNeoXForCausalLM"),
        "gpt2": tiny("GPT2LMHeadModel"),
        "gptj": tiny("GPTJForCausalLM", n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
        "granite": tiny("GraniteForCausalLM"),
        "llama": tiny("LlamaForCausalLM"),
        "minicpm3": tiny("MiniCPM3ForCausalLM", MLA),
        "mistral": tiny("MistralForCausalLM"),
        "modernbert-decoder": tiny("ModernBertDecoderForCausalLM"),
        "mpt": tiny("MptForCausalLM", d_model=32, n_heads=4, n_layers=2),
        "nanochat": tiny("NanoChatForCausalLM"),
        "nemotron": tiny("NemotronForCausalLM"),
        "olmo": tiny("OlmoForCausalLM"),
        "olmo2": tiny("Olmo2ForCausalLM"),
        "olmo3": tiny("Olmo3ForCausalLM"),
        "opt": tiny("OPTForCausalLM", ffn_dim=48, word_embed_proj_dim=16),
        "persimmon": tiny("PersimmonForCausalLM"),
        "phi": tiny("PhiForCausalLM"),
        "phi3": tiny("Phi3ForCausalLM"),
        "qwen2": tiny("Qwen2ForCausalLM"),
        "qwen3": tiny("Qwen3ForCausalLM", head_dim=8),
        "smollm3": tiny("SmolLM3ForCausalLM"),
        "stablelm": tiny("StableLmForCausalLM"),
        "starcoder2": tiny("Starcoder2ForCausalLM"),
        "xglm": tiny("XGLMForCausalLM", d_model=32, ffn_dim=48, num_layers=2, attention_heads=4),
        "xlnet": tiny("XLNetLMHeadModel", d_model=32, n_layer=2, n_head=4, d_inner=48, max_position_embeddings=...),
    },
    "encoder": {
        "albert": tiny("AlbertForSequenceClassification", embedding_size=16),
        "bert": tiny("BertForSequenceClassification"),
        "big-bird": tiny("BigBirdModel", attention_type="original_full"),
        "canine": tiny("CanineModel", num_hash_buckets=64, downsampling_rate=2, local_transformer_stride=8),
        "convbert": tiny("ConvBertForSequenceClassification", embedding_size=16),
        "deberta": tiny("DebertaForSequenceClassification", relative_attention=True, pos_att_type=["p2c", "c2p"]),
        "deberta-v2": tiny(
            "DebertaV2ForSequenceClassification",
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
            conv_kernel_size=3,
        ),
        "distilbert": tiny("DistilBertForSequenceClassification", dim=32, n_layers=2, n_heads=4, hidden_dim=48),
        "electra": tiny("ElectraForSequenceClassification", embedding_size=16),
        "esm": tiny("EsmForSequenceClassification", position_embedding_type="rotary", mask_token_id=5),
        "fnet": tiny("FNetForSequenceClassification"),
        "funnel": tiny(
            "FunnelForSequenceClassification",
            d_model=32,
            d_head=8,
            n_head=4,
            d_inner=48,
            block_sizes=[1, 1],
            num_decoder_layers=1,
            num_hidden_layers=...,
        ),
        "ibert": tiny("IBertForSequenceClassification"),
        "longformer": tiny("LongformerModel", attention_window=4),
        "mobilebert": tiny(
            "MobileBertForSequenceClassification", embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16
        ),
        "modernbert": tiny("ModernBertForSequenceClassification", local_attention=8),
        "mpnet": tiny("MPNetForSequenceClassification"),
        "nomic-bert": tiny("NomicBertForSequenceClassification"),
        "nystromformer": tiny("NystromformerForSequenceClassification", num_landmarks=4, segment_means_seq_len=16),
        "perceiver": tiny(
            "PerceiverForSequenceClassification",
            num_latents=8,
            d_latents=32,
            d_model=32,
            num_self_attends_per_block=1,
            num_self_attention_heads=4,
            num_cross_attention_heads=4,
        ),
        "roberta": tiny("RobertaForSequenceClassification"),
        "roformer": tiny("RoFormerForSequenceClassification", embedding_size=16),
        "squeezebert": tiny("SqueezeBertForSequenceClassification", embedding_size=32),
        "xlm-roberta": tiny("XLMRobertaForSequenceClassification"),
    },
    "encoder-decoder": {
        "bart": tiny("BartForConditionalGeneration", SEQ2SEQ),
        "blenderbot": tiny("BlenderbotForConditionalGeneration", SEQ2SEQ),
        "led": tiny(
            "LEDForConditionalGeneration",
            SEQ2SEQ,
            attention_window=4,
            max_encoder_position_embeddings=64,
            max_decoder_position_embeddings=64,
        ),
        "longt5": tiny(
            "LongT5ForConditionalGeneration",
            T5,
            encoder_attention_type="transient-global",
            local_radius=3,
            global_block_size=4,
        ),
        "m2m-100": tiny("M2M100ForConditionalGeneration", SEQ2SEQ),
        "marian": tiny("MarianMTModel", SEQ2SEQ, decoder_vocab_size=64),
        "mbart": tiny("MBartForConditionalGeneration", SEQ2SEQ),
        "mt5": tiny("MT5ForConditionalGeneration", T5),
        "pegasus": tiny("PegasusForConditionalGeneration", SEQ2SEQ),
        "prophetnet": tiny(
            "ProphetNetForConditionalGeneration",
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_encoder_layers=2,
            num_decoder_layers=2,
            num_encoder_attention_heads=4,
            num_decoder_attention_heads=4,
            num_hidden_layers=...,
        ),
        "t5": tiny("T5ForConditionalGeneration", T5),
    },
    "mixture of experts": {
        "dbrx": tiny(
            "DbrxForCausalLM",
            d_model=32,
            n_heads=4,
            n_layers=2,
            max_seq_len=64,
            attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
            ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        ),
        "deepseek-v2": tiny("DeepseekV2ForCausalLM", MOE, MLA),
        "deepseek-v3": tiny("DeepseekV3ForCausalLM", MOE, MLA),
        "ernie4-5-moe": tiny("Ernie4_5_MoeForCausalLM", moe_num_experts=4, moe_k=2, moe_intermediate_size=16),
        "glm4-moe": tiny("Glm4MoeForCausalLM", MOE, head_dim=8),
        "gpt-oss": tiny("GptOssForCausalLM", MOE, head_dim=8, sliding_window=8),
        "granitemoe": tiny("GraniteMoeForCausalLM", MOE),
        "jetmoe": tiny("JetMoeForCausalLM", MOE, kv_channels=8),
        "llama4": tiny("Llama4ForCausalLM", MOE, head_dim=8, intermediate_size_mlp=48),
        "mixtral": tiny("MixtralForCausalLM", MOE),
        "olmoe": tiny("OlmoeForCausalLM", MOE),
        "phimoe": tiny("PhimoeForCausalLM", MOE),
        "qwen2-moe": tiny("Qwen2MoeForCausalLM", MOE, shared_expert_intermediate_size=16),
        "qwen3-moe": tiny("Qwen3MoeForCausalLM", MOE, head_dim=8),
        "switch-transformers": tiny(
            "SwitchTransformersForConditionalGeneration",
            T5,
            num_decoder_layers=2,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
            num_experts=4,
        ),
    },
    "recurrent, hybrid": {
        "bamba": tiny("BambaForCausalLM", SSM, attn_layer_indices=[1]),
        "falcon-h1": tiny("FalconH1ForCausalLM", SSM, mamba_d_ssm=64),
        "falcon-mamba": tiny("FalconMambaForCausalLM", state_size=4),
        "granitemoehybrid": tiny(
            "GraniteMoeHybridForCausalLM", MOE, SSM, layer_types=["mamba", "attention"], shared_intermediate_size=16
        ),
        "jamba": tiny(
            "JambaForCausalLM",
            MOE,
            mamba_d_state=4,
            mamba_dt_rank=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            use_mamba_kernels=False,
        ),
        "lfm2": tiny("Lfm2ForCausalLM", layer_types=["conv", "full_attention"]),
        "mamba": tiny("MambaForCausalLM", state_size=4, time_step_rank=4),
        "mamba2": tiny("Mamba2ForCausalLM", state_size=4, num_heads=8, head_dim=8, n_groups=2, chunk_size=4),
        "minimax": tiny(
            "MiniMaxForCausalLM", MOE, head_dim=8, layer_types=["linear_attention", "full_attention"], block_size=4
        ),
        "nemotron-h": tiny(
            "NemotronHForCausalLM",
            layers_block_type=["mamba", "attention"],
            head_dim=8,
            mamba_num_heads=8,
            mamba_head_dim=8,
            ssm_state_size=4,
            n_groups=2,
            chunk_size=4,
        ),
        "qwen3-next": tiny(
            "Qwen3NextForCausalLM",
            MOE,
            head_dim=8,
            layer_types=["linear_attention", "full_attention"],
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            shared_expert_intermediate_size=16,
        ),
        "recurrent-gemma": tiny(
            "RecurrentGemmaForCausalLM", num_hidden_layers=3, lru_width=32, attention_window_size=8
        ),
        "rwkv": tiny("RwkvForCausalLM", attention_hidden_size=32, context_length=64),
        "xlstm": tiny("xLSTMForCausalLM", hidden_size=64, num_heads=4, qk_dim_factor=1.0, chunk_size=16),
        "zamba2": tiny(
            "Zamba2ForCausalLM",
            num_hidden_layers=3,
            layers_block_type=["mamba", "hybrid", "mamba"],
            mamba_d_state=4,
            n_mamba_heads=8,
            mamba_headdim=8,
            mamba_ngroups=2,
            chunk_size=4,
            num_mem_blocks=1,
            adapter_rank=4,
        ),
    },
    "vision": {
        "beit": tiny("BeitForImageClassification", IMAGE, use_relative_position_bias=True),
        "bit": tiny(
            "BitForImageClassification", STAGES, embedding_size=16, hidden_sizes=[16, 32, 48, 64], num_groups=4
        ),
        "convnext": tiny("ConvNextForImageClassification", STAGES),
        "convnextv2": tiny("ConvNextV2ForImageClassification", STAGES),
        "cvt": tiny(
            "CvtForImageClassification",
            num_hidden_layers=...,
            num_attention_heads=...,
            image_size=64,
            embed_dim=[8, 16, 32],
            num_heads=[1, 2, 4],
            depth=[1, 2, 3],
        ),
        "data2vec-vision": tiny("Data2VecVisionForImageClassification", IMAGE, use_shared_relative_position_bias=True),
        "deit": tiny("DeiTForImageClassification", IMAGE),
        "dinov2": tiny("Dinov2ForImageClassification", IMAGE),
        "dinov3-vit": tiny("DINOv3ViTModel", IMAGE),
        "dpt": tiny(
            "DPTForDepthEstimation",
            IMAGE,
            num_hidden_layers=4,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 16, 24, 32],
            fusion_hidden_size=16,
            is_hybrid=False,
        ),
        "efficientnet": tiny(
            "EfficientNetForImageClassification",
            image_size=64,
            width_coefficient=0.25,
            depth_coefficient=0.2,
            hidden_dim=320,
            num_hidden_layers=...,
        ),
        "hiera": tiny(
            "HieraForImageClassification",
            embed_dim=8,
            image_size=[64, 64],
            depths=[1, 1, 1, 1],
            num_heads=[1, 2, 2, 4],
            masked_unit_size=[8, 8],
        ),
        "levit": tiny(
            "LevitForImageClassification",
            STAGES,
            hidden_sizes=[16, 24, 32],
            num_attention_heads=[2, 2, 2],
            depths=[1, 1, 1],
            image_size=128,
            key_dim=[8, 8, 8],
        ),
        "mobilenet-v2": tiny("MobileNetV2ForImageClassification", depth_multiplier=0.25, image_size=64),
        "mobilevit": tiny(
            "MobileViTForImageClassification",
            image_size=128,
            patch_size=2,
            hidden_sizes=[16, 24, 32],
            neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32],
        ),
        "poolformer": tiny("PoolFormerForImageClassification", STAGES, patch_size=...),
        "pvt": tiny("PvtForImageClassification", STAGES),
        "regnet": tiny(
            "RegNetForImageClassification", STAGES, hidden_sizes=[32, 48, 64, 80], embedding_size=8, groups_width=8
        ),
        "resnet": tiny("ResNetForImageClassification", STAGES, embedding_size=8),
        "sam": tiny(
            "SamVisionModel",
            IMAGE,
            initializer_range=0.02,
            output_channels=16,
            window_size=2,
            global_attn_indexes=[1],
            mlp_dim=48,
        ),
        "segformer": tiny("SegformerForSemanticSegmentation", STAGES, decoder_hidden_size=16),
        "swin": tiny("SwinForImageClassification", SWIN),
        "swinv2": tiny("Swinv2ForImageClassification", SWIN),
        "timesformer": tiny("TimesformerForVideoClassification", VIDEO, shape=(2, 4, 3, 16, 16)),
        "videomae": tiny("VideoMAEForVideoClassification", VIDEO, tubelet_size=2, shape=(2, 4, 3, 16, 16)),
        "vit": tiny("ViTForImageClassification", IMAGE),
        "vit-mae": tiny(
            "ViTMAEForPreTraining",
            IMAGE,
            decoder_hidden_size=16,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=24,
        ),
        "vivit": tiny("VivitForVideoClassification", VIDEO, tubelet_size=[2, 8, 8], shape=(2, 4, 3, 16, 16)),
    },
    "vision and text": {
        "clip": tiny("CLIPModel", text_config=TINY, vision_config={**TINY, **IMAGE}, projection_dim=16),
        "siglip": tiny("SiglipModel", text_config=TINY, vision_config={**TINY, **IMAGE}),
    },
    "audio": {
        "ast": tiny(
            "ASTForAudioClassification",
            max_length=32,
            num_mel_bins=16,
            patch_size=8,
            frequency_stride=8,
            time_stride=8,
            shape=(2, 32, 16),
        ),
        "data2vec-audio": tiny("Data2VecAudioForCTC", SPEECH, num_conv_pos_embeddings=2, conv_pos_kernel_size=3),
        "hubert": tiny("HubertForCTC", SPEECH),
        "moonshine": tiny(
            "MoonshineForConditionalGeneration",
            encoder_num_hidden_layers=2,
            decoder_num_hidden_layers=2,
            encoder_num_attention_heads=4,
            decoder_num_attention_heads=4,
            shape=(2, 2000),
        ),
        "sew": tiny("SEWForCTC", SPEECH),
        "speech-to-text": tiny(
            "Speech2TextForConditionalGeneration",
            SEQ2SEQ,
            input_feat_per_channel=16,
            input_channels=1,
            conv_channels=16,
            max_source_positions=64,
            max_target_positions=32,
            shape=(2, 32, 16),
        ),
        "unispeech": tiny("UniSpeechForCTC", SPEECH),
        "wav2vec2": tiny("Wav2Vec2ForCTC", SPEECH),
        "wav2vec2-bert": tiny(
            "Wav2Vec2BertForCTC", feature_projection_input_dim=16, conv_depthwise_kernel_size=5, shape=(2, 20, 16)
        ),
        "wav2vec2-conformer": tiny("Wav2Vec2ConformerForCTC", SPEECH, conv_depthwise_kernel_size=5),
        "wavlm": tiny("WavLMForCTC", SPEECH),
        "whisper": tiny(
            "WhisperForConditionalGeneration",
            SEQ2SEQ,
            num_mel_bins=16,
            max_source_positions=16,
            max_target_positions=32,
            shape=(2, 16, 32),
        ),
    },
}

# family -> what a `Case` says of its idle sites
IDLE = {
    "cvt": (r".*stages\.2\.layers\.2\..*query.*", "of the last layer only the class token is read"),
}


def cases() -> Iterator[Case]:
    """The models of ``MODELS``."""
    for kind, table in MODELS.items():
        for name, entry in table.items():
            yield Case(name, kind, lambda entry=entry: build(*entry), IDLE.get(name, ("", "")))


def build(name: str, overrides: dict[str, Any], shape: tuple[int, ...]) -> Built:
    """Build a model class from a tiny configuration."""
    import transformers

    cls = getattr(transformers, name)
    options = overrides if "text_config" in overrides else {**TINY, **overrides}
    config = cls.config_class(**{key: value for key, value in options.items() if value is not ...})
    config._experts_implementation = "eager"  # the default, a grouped product of matrices, has no float64
    model = cls(config)
    text = torch.randint(3, TINY["vocab_size"], (2, 16))
    side = options.get("image_size", 32)
    side = side if isinstance(side, int) else side[0]
    known = {
        "input_ids": text,
        "inputs": text,
        "pixel_values": torch.randn(*shape or (2, 3, side, side), dtype=torch.float64),
        "input_values": torch.randn(*shape or (2, 400), dtype=torch.float64),
        "input_features": torch.randn(*shape or (2, 16, 16), dtype=torch.float64),
    }
    batch = {model.main_input_name: known[model.main_input_name]}
    if "text_config" in options:
        batch["pixel_values"] = known["pixel_values"]
    if config.is_encoder_decoder:
        batch["decoder_input_ids"] = text[:, :6]
    return model, lambda model: model(**batch)
