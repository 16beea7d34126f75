"""For processes that tests start: what transformers imports wherever it finds it, and these do not need, is not there.

This folder on the path of such a process takes two of the seven seconds of its start.
"""

import sys

sys.modules.update(dict.fromkeys(("bitsandbytes", "datasets", "peft", "sklearn", "tensorboard", "torchao"), None))
