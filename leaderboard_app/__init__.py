"""The web leaderboard: `app.py` routes, `views/` are pages, `figures.py` is pure, `data.py` reads and caches."""
