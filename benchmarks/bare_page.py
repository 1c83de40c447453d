"""The yardstick of the board's paint: a Streamlit page with one table and one Plotly chart and nothing else.

streamlit run benchmarks/bare_page.py
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import streamlit as st  # noqa: TID251  # this is what the board is compared with

ROWS, COLUMNS = 25, 12

st.set_page_config(page_title="bare", layout="wide")
numbers = np.random.default_rng(1).random((ROWS, COLUMNS))
st.plotly_chart(go.Figure(go.Bar(x=numbers[:, 0], y=[f"row {i}" for i in range(ROWS)], orientation="h")), key="ranking")
st.dataframe(pd.DataFrame(numbers, columns=[f"column {i}" for i in range(COLUMNS)]), key="board")
