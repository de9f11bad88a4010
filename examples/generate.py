"""One picture with a deadline, from Python: `python examples/generate.py`."""

from tetriserve import Engine


def main() -> None:
    with Engine(ranks=2, policy="tetriserve") as engine:
        picture = engine.generate("a red circle above a blue square", size="512x512", seed=7, slo_s=10)
    picture.image.save("picture.png")
    outcome = picture.outcome
    verdict = "in time" if outcome.is_attained else "late"
    print(f"picture.png, {verdict}: {outcome.latency_s:.2f} s, degree of each step {list(outcome.degrees)}")


if __name__ == "__main__":
    main()
