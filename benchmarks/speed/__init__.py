"""Time, beside Hugging Face PEFT in the same process: ``python -m benchmarks.speed`` or ``make bench``."""
