"""How warm is it, and how much of the fleet is too warm? Nobody tells; everybody knows.

Every device reads its own thermometer into its collection `temperature` (agent.toml: `[source.temperature]`,
`kind = "thermal"` on a Raspberry Pi, `kind = "termux-battery"` on a phone). Two questions are then asked of all of
them at once, and only sums leave the devices.

    python examples/temperature.py                                    on a few numbers, in this process
    python examples/temperature.py --fleet 20                         on 20 devices simulated here
    python examples/temperature.py --config coordinator.toml          on the fleet of a running coordinator
"""

from __future__ import annotations

import argparse

import sottovoce as sv

COLDEST, WARMEST = -40.0, 125.0
"""What such thermometers can measure, degrees Celsius: the most that one device can move a mean."""


@sv.tf_computation("float32", "float32")
def exceeds(reading, threshold):  # type: ignore[no-untyped-def]  # traced: the types stand above
    return reading > threshold


@sv.federated_computation("{float32}@CLIENTS")
def get_mean_temperature(readings):  # type: ignore[no-untyped-def]
    """The mean temperature of all devices."""
    return sv.federated_mean(readings, bound=(COLDEST, WARMEST))


@sv.federated_computation("{float32}@CLIENTS", "float32@SERVER")
def get_fraction_over_threshold(readings, threshold):  # type: ignore[no-untyped-def]
    """The fraction of devices that are warmer than a threshold."""
    above = sv.federated_map(exceeds, (readings, sv.federated_broadcast(threshold)))
    return sv.federated_mean(sv.federated_map(sv.cast("float32"), above))


def ask(readings, threshold: float) -> None:  # type: ignore[no-untyped-def]
    """Ask both questions, wherever computations run at the moment, and print the answers."""
    print(f"mean temperature: {get_mean_temperature(readings):.2f}")
    print(f"devices above {threshold:g}: {get_fraction_over_threshold(readings, threshold):.1%}")


def main() -> None:
    """Run the example where the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--fleet", type=int, metavar="N", help="on N devices simulated in this process")
    where.add_argument("--config", metavar="FILE", help="on the fleet of a running coordinator")
    parser.add_argument("--threshold", type=float, default=21.0, metavar="X", help="degrees Celsius (%(default)s)")
    options = parser.parse_args()
    from sottovoce.errors import SottovoceError

    try:
        _ask_where(options)
    except SottovoceError as error:
        parser.exit(1, f"temperature.py: {error}\n")


def _ask_where(options: argparse.Namespace) -> None:
    if options.fleet is not None:
        import simulation

        with simulation.fleet(devices=options.fleet):
            ask(sv.latest("temperature"), options.threshold)
    elif options.config:
        import coordinator

        with coordinator.connect(options.config):
            ask(sv.latest("temperature"), options.threshold)
    else:
        ask([68.5, 70.3, 69.8], 70.0)


if __name__ == "__main__":
    main()
