"""Write docs/reference: a page for the configuration of each job, and the JSON schema that editors read."""

from pathlib import Path

from vismt.files import atomic_write
from vismt.jobs.reference import files

if __name__ == "__main__":
    for name, content in files().items():
        atomic_write(Path(__file__).resolve().parent.parent / "docs" / "reference" / name, content)
