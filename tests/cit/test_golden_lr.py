"""The learning rate against the recorded one of the reference."""

from cit_cases import case

from frugal.cit.recipes import published_optimizer, published_schedule


def test_the_rate_of_every_recorded_update_is_the_reference_s() -> None:
    golden = case("lr_default")
    batch = 1_024
    schedule = published_schedule(golden.about["max_update"], batch)
    assert schedule.warmup_samples == golden.about["warmup_steps"] * batch
    assert schedule.floor == golden.about["min_lr"]
    peak = published_optimizer().peak(batch)
    assert peak == golden.about["lr"]
    for step, rate in zip(golden.tensors["step"], golden.tensors["lr"], strict=True):
        ours = schedule.learning_rate(int(step) * batch, peak=peak)
        assert abs(ours - float(rate)) < 1e-12, int(step)
