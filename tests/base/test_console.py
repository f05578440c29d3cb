"""Console output: what is hidden."""

from vismt.base import console


def test_quiet_hides_lines_of_its_body_alone(capsys):
    with console.quiet():
        console.stage("a", "hidden")
    console.stage("b", "shown")
    console.set_quiet(True)
    with console.quiet():
        pass
    console.stage("c", "still hidden")
    assert "".join(capsys.readouterr()).split() == ["b", "shown"]
