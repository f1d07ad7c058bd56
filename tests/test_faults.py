from tests.ranks import run_group
