"""Settings for every test: one thread, because small tensors gain nothing from more and a busy machine loses much."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the processes that tests start inherit it
