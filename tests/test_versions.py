"""What differs between the versions that samples were made by, and whether that matters."""

from app.versions import IMAGE, TASK_VERSION, Mixture, made, mixed

OLD = {"python": "3.13.1", "inspect_ai": "0.3.285", TASK_VERSION: "1", IMAGE: "sha256:a"}


def test_what_is_alike_is_not_mixed() -> None:
    assert mixed([]) == []
    assert mixed([made(None, None, 3)]) == []
    assert mixed([made(OLD, None, 3), made(dict(OLD), [OLD], 4)]) == []


def test_each_thing_that_differs_is_listed_with_its_samples() -> None:
    new = OLD | {"inspect_ai": "0.3.286", TASK_VERSION: "2"}
    newer = new | {TASK_VERSION: "3"}
    assert mixed([made(OLD, None, 3), made(new, None, 4), made(newer, None, 1)]) == [
        Mixture(name="inspect_ai", samples={"0.3.285": 3, "0.3.286": 5}, flagged=True),
        Mixture(name=TASK_VERSION, samples={"1": 3, "2": 4, "3": 1}, flagged=True),
    ]


def test_another_image_with_the_same_in_it_is_told_and_not_flagged() -> None:
    assert mixed([made(OLD, None, 3), made(OLD | {IMAGE: "sha256:b"}, None, 4)]) == [
        Mixture(name=IMAGE, samples={"sha256:a": 3, "sha256:b": 4}, flagged=False)
    ]


def test_what_an_earlier_version_of_proctor_did_not_record_may_have_been_anything() -> None:
    found = mixed([made({"inspect_ai": "0.3.285"}, None, 3), made(None, None, 2)])
    assert found == [Mixture(name="inspect_ai", samples={"0.3.285": 3, "not recorded": 2}, flagged=True)]


def test_samples_that_another_version_had_begun_are_of_both() -> None:
    new = OLD | {"inspect_ai": "0.3.286"}
    assert mixed([made(new, [OLD, new], 2), made(new, None, 3)]) == [
        Mixture(name="inspect_ai", samples={"0.3.285": 2, "0.3.286": 5}, flagged=True)
    ]


def test_so_are_those_that_were_begun_by_nobody_knows_what() -> None:
    found = mixed([made({"inspect_ai": "0.3.285"}, [{}], 3)])
    assert found == [Mixture(name="inspect_ai", samples={"0.3.285": 3, "not recorded": 3}, flagged=True)]
