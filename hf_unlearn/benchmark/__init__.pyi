from .grid import run_grid as run_grid
from .registry import BENCHMARKS as BENCHMARKS
from .registry import Benchmark as Benchmark
from .registry import Column as Column
