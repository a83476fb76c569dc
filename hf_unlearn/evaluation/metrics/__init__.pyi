from .intervals import Estimate as Estimate
from .intervals import Undefined as Undefined
from .intervals import bootstrap as bootstrap
from .intervals import bootstrap_auc as bootstrap_auc
from .intervals import bootstrap_mean as bootstrap_mean
from .intervals import undefined as undefined
