"""The leaderboard in the browser: a router, nothing else. A page is one file in views/ and one line here.

Example: EFFBENCH_RESULTS=results/reference streamlit run leaderboard_app/app.py
"""

from __future__ import annotations

import streamlit as st

from leaderboard_app import data

st.set_page_config(page_title="effbench", page_icon=":material/speed:", layout="wide")
page = st.navigation(
    [
        st.Page("views/board.py", title="Board", icon=":material/leaderboard:", default=True),
        st.Page("views/tradeoffs.py", title="Trade-offs", icon=":material/trending_up:"),
        st.Page("views/compare.py", title="Compare", icon=":material/compare_arrows:"),
        st.Page("views/run.py", title="Run", icon=":material/manage_search:"),
        st.Page("views/claims.py", title="Claims", icon=":material/fact_check:"),
        st.Page("views/method.py", title="Method", icon=":material/science:"),
        st.Page("views/submit.py", title="Submit", icon=":material/upload:"),
    ]
)
with data.turn():
    page.run()
