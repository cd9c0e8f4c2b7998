import sys
from pathlib import Path

# The benchmarks are scripts beside each other, which import one another by name.
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
