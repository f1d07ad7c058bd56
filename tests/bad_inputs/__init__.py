"""The campaign of wrong inputs: a table of cases for each area, and what runs them; see `__main__`."""

from tests.bad_inputs.case import Case
from tests.bad_inputs.command_line import CASES as COMMAND_LINE
from tests.bad_inputs.data import CASES as DATA
from tests.bad_inputs.judges import CASES as JUDGES
from tests.bad_inputs.models import CASES as MODELS
from tests.bad_inputs.numbers import CASES as NUMBERS
from tests.bad_inputs.paths import CASES as PATHS
from tests.bad_inputs.recipes import CASES as RECIPES
from tests.bad_inputs.runs import CASES as RUNS

AREAS: dict[str, list[Case]] = {
    "recipes": RECIPES,
    "numbers": NUMBERS,
    "command line": COMMAND_LINE,
    "paths": PATHS,
    "data": DATA,
    "models": MODELS,
    "runs": RUNS,
    "judges": JUDGES,
}
