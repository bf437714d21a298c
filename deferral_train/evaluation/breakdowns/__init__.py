"""Where acceptance comes from: by index in the block, copy rate, domain, architecture; Max-Gram's failures by class
of input; drafting settings side by side.
"""

from deferral_train.evaluation.breakdowns.make import BREAKDOWNS, check_names, make_breakdowns
from deferral_train.evaluation.breakdowns.prompts import read_part
from deferral_train.evaluation.breakdowns.tables import Breakdowns

__all__ = ["BREAKDOWNS", "Breakdowns", "check_names", "make_breakdowns", "read_part"]
