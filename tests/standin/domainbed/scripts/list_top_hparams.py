"""Print the hyper-parameters of a test environment, the best first, for each selection method and trial."""

from __future__ import annotations

import argparse
from typing import Any

from domainbed import announce
from domainbed.lib import reporting
from domainbed.scripts.collect_results import METHODS


def print_run(choice: dict[str, float], records: list[dict[str, Any]]) -> None:
    """Print one run: its accuracies, hyper-parameters and folders."""
    print(f"\t{choice}", "\t\thparams:", sep="\n")
    for name, value in sorted(records[0]["hparams"].items()):
        print(f"\t\t\t{name}: {value}")
    print("\t\toutput_dirs:")
    for folder in sorted({record["args"]["output_dir"] for record in records}):
        print(f"\t\t\t{folder}")


def main(argv: list[str] | None = None) -> None:
    """Read the records and print the lists."""
    announce("list_top_hparams")
    parser = argparse.ArgumentParser(description="Best hyper-parameters (stand-in for DomainBed)")
    for flag in ("input_dir", "dataset", "algorithm", "test_env"):
        parser.add_argument(f"--{flag}", required=True)
    args = parser.parse_args(argv)
    records = reporting.load_records(args.input_dir)
    wanted = {"dataset": args.dataset, "algorithm": args.algorithm, "test_env": int(args.test_env)}
    groups = [
        g for g in reporting.get_grouped_records(records) if all(g[key] == value for key, value in wanted.items())
    ]
    print(f"Total records: {len(records)}")
    for method in METHODS:
        print(f"Model selection: {method.name}")
        for group in groups:
            print(f"trial_seed: {group['trial_seed']}")
            for choice, run in method.hparams_accs(group["records"]):
                print_run(choice, run)


if __name__ == "__main__":
    main()
