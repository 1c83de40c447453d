"""How rows come to be on a board, today: what a person can do, and what is not there yet."""

from __future__ import annotations

import streamlit as st

from leaderboard_app import data

MEASURE = """effbench doctor --calibrate                       # what this machine can measure, and its own peak rates
effbench plan suites/quick.yaml                   # what would run, and the memory that it needs
effbench run suites/quick.yaml --results results/mine --protocol publish"""
CHECK = """effbench show --results results/mine
effbench export rows.csv --results results/mine --recompute   # every number from its raw trace again"""
PASS_ON = """effbench compact --results results/mine
tar -czf results-mine.tar.gz results/mine"""
RECEIVE = "effbench board --results results/theirs --results results/reference"


def page() -> None:
    st.title("Submit")
    st.info("There is no upload here and no command that submits. Rows are files: pass on the folder.", icon=":material/info:")
    st.header("1. Measure")
    st.markdown(
        "Each case becomes a row in `results/mine/runs`, its launches in `launches`, their raw series in `traces`. A run that is "
        "stopped goes on where it was. Rows of the protocol `quick` are screening and claim no difference below 10 %; `publish` "
        "takes longer and has no such floor."
    )
    st.code(MEASURE, language="bash")
    st.header("2. Check")
    st.markdown(
        "`--recompute` computes every metric from its trace and compares. It ends with exit code 1 where a number differs. It "
        "shows that rows and traces agree, not that nobody changed both."
    )
    st.code(CHECK, language="bash")
    st.header("3. Pass it on")
    st.markdown(
        "The folder holds all there is: rows, launches, traces. Look into it first: a row names the processor or GPU, driver, "
        "package versions and kernel of the machine, and a launch that failed keeps its traceback, with paths of files."
    )
    st.code(PASS_ON, language="bash")
    st.markdown(
        "`effbench export rows.parquet` writes the numbers alone, one line for each row and metric, and `effbench export --html "
        "board.html` one page to look at. Neither can be shown here: that takes the folder."
    )
    st.header("4. Show what you were given")
    st.markdown("Name several folders and their rows stand on one board. Folders are read, never written.")
    st.code(RECEIVE, language="bash")
    st.header("Not there yet")
    st.markdown(
        "Bundles, a check of rows that a stranger sent, and a queue for review: they are to have commands of their own, which "
        "this version does not have. The project's own rows are in `results/reference`, with their traces."
    )
    st.caption("This board reads:")
    st.text("\n".join(str(folder) for folder in data.folders()))


page()
