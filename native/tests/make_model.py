"""make_model.py OUT: the tiny random model that the native tests stream."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from tiny_models import write_tiny_llama

write_tiny_llama(Path(sys.argv[1]))
