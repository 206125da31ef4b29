"""Makes `import moult` work in the commands of this folder: the library is one folder up."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
