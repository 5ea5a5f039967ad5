import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `oracles` and siblings, whatever way pytest is started
