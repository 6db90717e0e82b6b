import pytest

from dualparal.config.eight_bit import EightBitPolicy, LinearPolicy


def test_off_unless_asked_for():
    schedule = EightBitPolicy()
    assert not schedule.on and not any(map(schedule.covers, range(4)))
    assert not any(schedule.at(step, 6) for step in range(6))


@pytest.mark.parametrize("mode", ["int8", "fp8"])
def test_what_is_left_out(mode):
    schedule = EightBitPolicy(mode, keep_layers=(0, 3), first_steps=2, last_steps=1)
    assert [layer for layer in range(5) if schedule.covers(layer)] == [1, 2, 4]
    assert [step for step in range(6) if schedule.at(step, 6)] == [2, 3, 4]


def test_everything_left_out():
    schedule = EightBitPolicy("int8", first_steps=3, last_steps=3)
    assert not any(schedule.at(step, 5) for step in range(5))
    assert schedule.at(3, 7)
    schedule.check_steps(7)
    with pytest.raises(ValueError, match="none of 6 steps"):
        schedule.check_steps(6)
    EightBitPolicy().check_steps(1)


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
        (dict(first_steps=1), "exceptions"),
        (dict(keep_layers=(1,)), "exceptions"),
    ],
)
def test_bad_values_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        EightBitPolicy(**options)


@pytest.mark.parametrize("kind, name", [(EightBitPolicy, "8-bit attention"), (LinearPolicy, "8-bit linears")])
def test_the_option_is_named(kind, name):
    """Both have layers of their own."""
    for mode, layers, says in (("fp8", (1, 1), "twice"), ("fp8", [0], "counted from 0"), ("off", (1,), "off")):
        with pytest.raises(ValueError, match=f"{name}.*{says}"):
            kind(mode, layers)
    for layers, says in (((0, 9), f"{name}: the model has 2 layers"), ((0, 1), f"to {name}")):
        with pytest.raises(ValueError, match=says):
            kind("fp8", layers).check(2)


def test_layers_of_the_model():
    EightBitPolicy("int8", keep_layers=(0, 29)).check(30)
    with pytest.raises(ValueError, match="0 to 27"):
        EightBitPolicy("int8", keep_layers=(0, 29)).check(28)
    with pytest.raises(ValueError, match="none of the model's 2 layers"):
        EightBitPolicy("int8", keep_layers=(0, 1)).check(2)


def test_frozen():
    with pytest.raises(AttributeError):
        EightBitPolicy().mode = "int8"
