from bevel.core.errors import BevelError, ProofError, one_line, suggestion


def test_one_line_folds_breaks_and_cuts() -> None:
    assert one_line("a\n  b\tc") == "a b c"
    cut = one_line("word " * 100, limit=20)
    assert len(cut) <= 20
    assert cut.endswith("…")


def test_a_near_name_is_suggested_and_the_rest_listed() -> None:
    text = suggestion("onnxruntme", ["onnxruntime", "eager"])
    assert text == "Did you mean 'onnxruntime'? Available: eager, onnxruntime."
    assert suggestion("zzz", ["eager"]) == "Available: eager."
    assert suggestion("zzz", []) == "None is available."


def test_long_lists_are_cut() -> None:
    text = suggestion("zzz", [f"name{i:03d}" for i in range(60)])
    assert "60 in all" in text
    assert "name059" not in text


def test_exit_codes_tell_user_mistakes_from_faults() -> None:
    assert BevelError.exit_code == 2
    assert ProofError.exit_code == 1
