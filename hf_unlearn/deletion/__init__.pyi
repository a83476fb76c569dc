from .arguments import RunArguments as RunArguments
from .ledger import Ledger as Ledger
from .request import Request as Request
from .series import RequestSeries as RequestSeries
