"""Exchange: submissions and their verification; part of the reading arm."""
