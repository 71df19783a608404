"""The section of a run's report: what it tells, beside what each residue tells by itself."""

from pathlib import Path

from mambaseq.reporting import Section, table
from mambaseq.reporting.runs import RunFolder
from mambaseq.runs.parsing import parse_config
from mambaseq_protein.chains import preferences


def report(run: Path) -> Section:
    folder = RunFolder(run)
    data, results = parse_config(str(folder.config), []).make_data(setup=True), folder.read_results()
    if not data.class_names:
        return Section("Chains", f"{results['val/bits_per_token']:.3f} bits a hidden residue", "")
    chains, wanted = data.validation() or [], preferences().argmax(0)
    items = [chains[number] for number in range(len(chains))]
    alone = sum((wanted[one.inputs[0]] == one.targets[0].numpy()).mean() for one in items) / len(items)
    rows = [("this run", results["val/accuracy"]), ("each residue by itself", float(alone))]
    return Section("Chains", "labels that are right", table(("", "share"), rows))
