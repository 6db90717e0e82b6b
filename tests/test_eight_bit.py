import pytest

from dualparal.eight_bit import EightBitSchedule


def test_off_unless_asked_for():
    assert not any(EightBitSchedule().enabled(layer, step, 6) for layer in range(4) for step in range(6))


@pytest.mark.parametrize("mode", ["int8", "fp8"])
def test_what_is_left_out(mode):
    schedule = EightBitSchedule(mode, keep_layers=(0, 3), first_steps=2, last_steps=1)
    on = {(layer, step) for layer in range(5) for step in range(6) if schedule.enabled(layer, step, 6)}
    assert on == {(layer, step) for layer in (1, 2, 4) for step in (2, 3, 4)}


def test_everything_left_out():
    schedule = EightBitSchedule("int8", first_steps=3, last_steps=3)
    assert not any(schedule.enabled(0, step, 5) for step in range(5))
    assert schedule.enabled(0, 3, 7)


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(mode="int4"), "mode='int4'"),
        (dict(keep_layers=[0]), r"keep_layers=\[0\]"),
        (dict(keep_layers=(-1,)), r"\(-1,\)"),
        (dict(keep_layers=(True,)), r"\(True,\)"),
        (dict(keep_layers=(2, 2)), "twice"),
        (dict(first_steps=-1), "first_steps=-1"),
        (dict(last_steps=1.5), "last_steps=1.5"),
        (dict(last_steps=True), "last_steps=True"),
    ],
)
def test_bad_values_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        EightBitSchedule(**options)


@pytest.mark.parametrize("layer, step, num_steps", [(-1, 0, 4), (0, -1, 4), (0, 4, 4)])
def test_no_such_step(layer, step, num_steps):
    with pytest.raises(ValueError, match="counted from 0"):
        EightBitSchedule("int8").enabled(layer, step, num_steps)


def test_layers_of_the_model():
    EightBitSchedule("int8", keep_layers=(0, 29)).check_layers(30)
    with pytest.raises(ValueError, match="0 to 27"):
        EightBitSchedule("int8", keep_layers=(0, 29)).check_layers(28)


def test_frozen():
    with pytest.raises(AttributeError):
        EightBitSchedule().mode = "int8"
