from .digits import run_digits as run_digits
from .people import run_people as run_people
