from .collect import collect_statistics as collect_statistics
from .eigen import Eigen as Eigen
from .eigen import leading_basis as leading_basis
from .retain_statistics import RetainStatistics as RetainStatistics
from .sketch import Sketching as Sketching
