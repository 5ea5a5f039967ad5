"""What a refusal looks like."""


def refused(outcome, *fragments: str) -> None:
    """Exit code 2 and one sentence, the last line, that holds the fragments."""
    assert outcome.code == 2, (outcome.out, outcome.err)
    last = outcome.err.splitlines()[-1]
    assert last.startswith("error: ") and outcome.err.count("error: ") == 1
    for fragment in fragments:
        assert fragment in last, last
