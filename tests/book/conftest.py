"""The scripts in book/ are no package; the tests import them as the scripts import each other: by name."""

import sys
from pathlib import Path

BOOK = Path(__file__).parents[2] / "book"
sys.path[:0] = [str(BOOK), str(BOOK / "_ext")]
