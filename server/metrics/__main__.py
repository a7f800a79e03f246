"""`python -m server.metrics`: the table of all families, as it stands in README.md."""

from server.metrics.families import FAMILIES, PREFIX, Family


def row(family: Family) -> str:
    """One family as a line of the table."""
    labels = [f"{label}={','.join(values)}" if values else label for label, values in family.labels.items()]
    return f"| `{PREFIX}{family.name}` | {family.kind} | {' '.join(labels)} | {family.help} |"


if __name__ == "__main__":
    print("| family | type | labels | what it says |\n|---|---|---|---|")
    print("\n".join(map(row, FAMILIES.values())))
