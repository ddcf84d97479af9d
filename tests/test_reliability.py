"""The page of faults that the test run writes."""

from __future__ import annotations

from reliability import PAGE, Recorder, Row, _exists, read_page, render_page

HERE = "tests/test_reliability.py"
ROWS = [
    Row("A file | is cut", "an error names it", "0 bytes", f"{HERE}::test_rows_are_replaced_by_those_of_their_test"),
    Row("Another fault", "nothing", "1 step", f"{HERE}::test_the_page_is_read_as_it_was_written"),
]


def test_the_page_is_read_as_it_was_written() -> None:
    assert read_page(render_page(ROWS)) == ROWS


def test_cases_of_a_fault_are_one_row_which_is_replaced_as_a_whole() -> None:
    cases = [ROWS[1]._replace(fault=f"resumed with another value: {case}") for case in ("mu", "seed")]
    [row] = read_page(render_page(cases))
    assert row == ROWS[1]._replace(fault="Resumed with another value: mu; seed")
    assert read_page(render_page([row])) == [row]


def test_rows_are_replaced_by_those_of_their_test() -> None:
    recorder = Recorder()
    recorder.ran, recorder.rows = {ROWS[0].test}, [ROWS[0]._replace(lost="1 byte")]
    gone = Row("x", "y", "z", f"{HERE}::test_that_is_gone")
    assert recorder.merged([*ROWS, gone]) == [ROWS[0]._replace(lost="1 byte"), ROWS[1]]


def test_the_page_names_tests_that_exist() -> None:
    rows = read_page(PAGE.read_text(encoding="utf-8"))
    assert len({row.fault for row in rows}) == len(rows) > 0
    assert [row.test for row in rows if not _exists(row.test)] == []
