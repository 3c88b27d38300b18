"""What differs between the versions that samples were made by, and whether that matters."""

from app.versions import IMAGE, TASK_VERSION, Mixture, mixed

OLD = {"python": "3.13.1", "inspect_ai": "0.3.285", TASK_VERSION: "1", IMAGE: "sha256:a"}


def test_what_is_alike_is_not_mixed() -> None:
    assert mixed([]) == []
    assert mixed([(None, 3)]) == []
    assert mixed([(OLD, 3), (dict(OLD), 4)]) == []


def test_each_thing_that_differs_is_listed_with_its_samples() -> None:
    new = OLD | {"inspect_ai": "0.3.286", TASK_VERSION: "2"}
    newer = new | {TASK_VERSION: "3"}
    assert mixed([(OLD, 3), (new, 4), (newer, 1)]) == [
        Mixture(name="inspect_ai", samples={"0.3.285": 3, "0.3.286": 5}, flagged=True),
        Mixture(name=TASK_VERSION, samples={"1": 3, "2": 4, "3": 1}, flagged=True),
    ]


def test_another_image_with_the_same_in_it_is_told_and_not_flagged() -> None:
    assert mixed([(OLD, 3), (OLD | {IMAGE: "sha256:b"}, 4)]) == [
        Mixture(name=IMAGE, samples={"sha256:a": 3, "sha256:b": 4}, flagged=False)
    ]


def test_what_an_earlier_version_of_proctor_did_not_record_may_have_been_anything() -> None:
    found = mixed([({"inspect_ai": "0.3.285"}, 3), (None, 2)])
    assert found == [Mixture(name="inspect_ai", samples={"0.3.285": 3, "not recorded": 2}, flagged=True)]
