"""The models of timm: of every family (a module of ``timm.models``) the cheapest, and a few that differ from it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.coverage.case import Built, Case

# family -> models, each at the smallest input that it takes. The first is the cheapest of the family; the others have
# layers of another sort. For a family that is not here, `pick` picks.
MODELS = {
    "beit": "beit_base_patch16_224@64 beitv2_base_patch16_224@64",
    "byoanet": "eca_botnext26ts_256@64 halonet_h1@256 lambda_resnet26rpt_256@64",
    "byobnet": "test_byobnet@64 mobileone_s0@64 repvgg_a0@64 gernet_s@64 resnet50_clip@64",
    "cait": "cait_xxs24_224@64",
    "coat": "coat_tiny@64 coat_lite_tiny@64",
    "convit": "convit_tiny@64",
    "convmixer": "convmixer_768_32@64",
    "convnext": "test_convnext@64 test_convnext2@64 test_convnext3@64",
    "cpubone": "cpubone_nano@64",
    "crossvit": "crossvit_tiny_240@240",
    "csatv2": "csatv2@64",
    "cspnet": "cs3darknet_focus_s@64 cspresnet50@64 darknet17@64",
    "cspnext": "cspnext_tiny@64",
    "davit": "davit_tiny@64",
    "deepseek_vit": "deepseek_vit_412m@112",
    "deit": "deit_tiny_patch16_224@64 deit_tiny_distilled_patch16_224@64 deit3_small_patch16_224@64",
    "densenet": "densenet121@64",
    "dla": "dla46x_c@64",
    "dpn": "dpn48b@64",
    "edgenext": "edgenext_xx_small@64",
    "efficientformer": "efficientformer_l1@224",
    "efficientformer_v2": "efficientformerv2_s0@64",
    "efficientnet": "test_efficientnet@64 tf_efficientnet_cc_b0_4e@64 mixnet_s@64 mobilenetv4_hybrid_medium_075@64",
    "efficientvim": "efficientvim_m1@64",
    "efficientvit_mit": "efficientvit_b0@64",
    "efficientvit_msra": "efficientvit_m0@96",
    "eva": "vit_tiny_patch16_dinov3_qkvb@64 eva02_tiny_patch14_224@64 vit_pe_core_tiny_patch16_384@64",
    "fasternet": "fasternet_t0@64",
    "fastvit": "fastvit_t8@64 fastvit_sa12@64",
    "focalnet": "focalnet_tiny_srf@64",
    "gcvit": "gcvit_xxtiny@64",
    "gemma4_vit": "gemma4_vit_167m@64",
    "ghostnet": "ghostnet_050@64 ghostnetv2_100@64 ghostnetv3_050@64",
    "hardcorenas": "hardcorenas_b@64",
    "hgnet": "hgnetv2_b0@64",
    "hiera": "hiera_tiny_224@64",
    "hieradet_sam2": "sam2_hiera_tiny@64",
    "hrnet": "hrnet_w18_small@64",
    "iformer": "iformer_t@64",
    "inception_next": "inception_next_atto@64",
    "inception_resnet_v2": "inception_resnet_v2@96",
    "inception_v3": "inception_v3@96",
    "inception_v4": "inception_v4@96",
    "lcnetv2": "lcnetv2_small@64",
    "levit": "levit_128s@64 levit_conv_128s@64",
    "lowformer": "lowformer_b0@64",
    "mambaout": "test_mambaout@64",
    "maxxvit": "test_coatnet@64 test_maxvit@64 maxxvit_rmlp_nano_rw_256@64",
    "metaformer": "poolformerv2_s12@64 convformer_s18@64 caformer_s18@64",
    "mlp_mixer": "gmlp_ti16_224@64 gmixer_12_224@64 mixer_s32_224@64 resmlp_12_224@64",
    "mobilenetv3": "mobilenetv3_small_050@64 lcnet_035@64 fbnetv3_b@64",
    "mobilenetv5": "mobilenetv5_base@64",
    "mobilevit": "mobilevit_xxs@64 mobilevitv2_050@64",
    "mvitv2": "mvitv2_tiny@64",
    "naflexvit": "naflexvit_base_patch16_gap@64 naflexvit_base_patch16_map@64",
    "nasnet": "nasnetalarge@64",
    "nest": "nest_tiny@64",
    "nextvit": "nextvit_small@64",
    "nfnet": "test_nfnet@64 nf_resnet26@64 eca_nfnet_l0@64",
    "pit": "pit_ti_224@64 pit_ti_distilled_224@64",
    "pnasnet": "pnasnet5large@64",
    "pvt_v2": "pvt_v2_b0@64",
    "qwen3_vit": "qwen3_vit_88m@64",
    "rdnet": "rdnet_tiny@64",
    "regnet": "regnetx_002@64 regnety_002@64",
    "repghost": "repghostnet_050@64",
    "repvit": "repvit_m1@64",
    "res2net": "res2next50@64",
    "resnest": "resnest14d@64",
    "resnet": "test_resnet@64 resnet10t@64 ecaresnet26t@64 seresnext26t_32x4d@64",
    "resnetv2": "resnetv2_18@64 resnetv2_50x1_bit@64",
    "rexnet": "rexnet_100@64",
    "selecsls": "selecsls42@64",
    "senet": "legacy_seresnet18@64 legacy_seresnext26_32x4d@64",
    "sequencer": "sequencer2d_s@64",
    "shvit": "shvit_s1@64",
    "sknet": "skresnet18@64",
    "starnet": "starnet_s050@64",
    "swiftformer": "swiftformer_xs@64",
    "swin_transformer": "swin_tiny_patch4_window7_224@64",
    "swin_transformer_v2": "swinv2_tiny_window8_256@64",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224@64",
    "tiny_vit": "tiny_vit_5m_224@64",
    "tnt": "tnt_s_legacy_patch16_224@64 tnt_s_patch16_224@64",
    "tresnet": "tresnet_m@64",
    "twins": "twins_svt_small@64 twins_pcpvt_small@64",
    "vgg": "vgg11@64",
    "visformer": "visformer_tiny@64",
    "vision_transformer": "test_vit@64 test_vit2@64 vit_small_patch16_18x2_224@64 vit_base_patch16_siglip_224@64",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224@64",
    "vision_transformer_relpos": "test_vit_relpos@64 vit_srelpos_small_patch16_224@64",
    "vision_transformer_sam": "samvit_base_patch16_224@64",
    "vitamin": "vitamin_small_224@64",
    "volo": "volo_d1_224@64",
    "vovnet": "ese_vovnet19b_slim_dw@64 vovnet39a@64",
    "xception": "legacy_xception@64",
    "xception_aligned": "xception41p@64",
    "xcit": "xcit_nano_12_p8_224@64",
}
# Blocks that only repeat are left out where even the cheapest model is large.
FEWER = {
    "beit_base_patch16_224": {"depth": 3},
    "beitv2_base_patch16_224": {"depth": 3},
    "deepseek_vit_412m": {"depth": 2},
    "gemma4_vit_167m": {"depth": 2},
    "naflexvit_base_patch16_gap": {"depth": 2},
    "naflexvit_base_patch16_map": {"depth": 2},
    "qwen3_vit_88m": {"depth": 2},
    "samvit_base_patch16_224": {"depth": 3},
    "vit_base_patch16_siglip_224": {"depth": 2},
    "vit_small_patch16_18x2_224": {"depth": 2},
}
SIZES = (64, 96, 112, 128, 160, 192, 224, 240, 256, 288, 299, 320, 384, 448, 512)  # of inputs, to try


def cases() -> Iterator[Case]:
    """The models of ``MODELS``, and the cheapest one of every family that is not listed there."""
    import timm

    for family in timm.list_modules():
        for model in (MODELS.get(family) or pick(family)).split():
            fewer = "".join(f", {key}={value}" for key, value in FEWER.get(model.split("@")[0], {}).items())
            yield Case(family, model + fewer, lambda model=model: build(model))


def build(chosen: str) -> Built:
    """Build ``name@size``."""
    name, size = chosen.split("@")
    image = torch.randn(2, 3, int(size), int(size), dtype=torch.float64)
    return create(name, int(size)), lambda model: model(image)


def create(name: str, size: int) -> nn.Module:
    """Build a model for an input size, where its size is a part of the model."""
    import timm

    try:
        return timm.create_model(name, img_size=size, **FEWER.get(name, {}))
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return timm.create_model(name, **FEWER.get(name, {}))


def pick(family: str) -> str:
    """Find the model of a family with the fewest parameters and the smallest input that it takes."""
    import timm

    def cost(name: str) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model(name).parameters())

    name = min(timm.list_models(module=family), key=cost)
    for size in SIZES:
        try:
            with torch.no_grad():
                create(name, size).eval()(torch.zeros(2, 3, size, size))
        except Exception:  # models refuse a size in every possible way
            continue
        return f"{name}@{size}"
    return f"{name}@{SIZES[-1]}"  # the check will say what is wrong with it
