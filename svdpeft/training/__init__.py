"""Training: a ``transformers.Trainer`` that knows adapters, and a callback that teaches a stock one."""
