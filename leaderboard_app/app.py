"""The leaderboard in the browser: a router, nothing else. A page is one file in views/ and one line here.

Example: EFFBENCH_RESULTS=results/reference streamlit run leaderboard_app/app.py
"""

from __future__ import annotations

import streamlit as st

st.set_page_config(page_title="effbench", page_icon=":material/speed:", layout="wide")
st.navigation([st.Page("views/board.py", title="Board", icon=":material/leaderboard:", default=True)]).run()
