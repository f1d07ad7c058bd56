from difftune.data.contamination import ProblemIndex

LONG = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many in all?"
SHORT = "What is 17 times 23 minus 4?"


def test_a_problem_is_found_whatever_its_layout():
    index = ProblemIndex({"gsm8k": [LONG], "math": [SHORT]})
    assert index.found_in(f"Solve this.\n\n{LONG.upper().replace(', ', '  ,')} Think.") == {"gsm8k"}
    assert index.found_in("Please tell: what is $17$ times $23$ minus $4$?") == {"math"}


def test_other_numbers_or_a_shared_phrase_are_another_problem():
    index = ProblemIndex({"gsm8k": [LONG], "math": [SHORT]})
    assert not index.found_in("What is 17 times 29 minus 4?")
    assert not index.found_in("Anna sold clips to 12 of her friends in April. How many clips in all did she sell?")


def test_part_of_a_long_problem_is_enough():
    assert ProblemIndex({"gsm8k": [LONG]}).found_in(LONG[: LONG.index("How many")]) == {"gsm8k"}


def test_problems_that_turn_up_by_chance_are_left_out():
    assert not ProblemIndex({"svamp": ["Compute 3 + 4."]}).found_in("Compute 3 + 4. Then compute 5 + 6 and add both.")


def test_no_test_set_finds_nothing():
    assert ProblemIndex({}).found_in(LONG) == set()


def test_problems_that_are_too_short_are_counted():
    index = ProblemIndex({"svamp": ["Compute 3 + 4.", LONG], "math": [SHORT]})
    assert dict(index.too_short) == {"svamp": 1}


def test_a_run_is_found_anywhere_in_a_long_text_and_not_over_a_gap():
    index = ProblemIndex({"gsm8k": [LONG]})
    words = LONG.split()
    filler = " ".join(f"filler{n}" for n in range(500))
    assert index.found_in(f"{filler} {' '.join(words[4:17])} {filler}") == {"gsm8k"}
    assert not index.found_in(f"{filler} {' '.join(words[4:16])} {filler}"), "one word less than a run"
    assert not index.found_in(f"{' '.join(words[:8])} {filler} {' '.join(words[8:16])}")
