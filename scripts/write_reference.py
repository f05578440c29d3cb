"""Write docs/reference: a page for the configuration of each job, and the JSON schema that editors read."""

from pathlib import Path

from vismt.jobs.reference import files
from vismt.storage.files import atomic_write

if __name__ == "__main__":
    for name, content in files().items():
        atomic_write(Path(__file__).resolve().parent.parent / "docs" / "reference" / name, content)
