"""What a bundle may cost at most. Of honest runs, 100 by the protocol `quick` are about 3 MB and 115 by `publish` fill one.

The size of a bundle, the address space, the CPU time and two at a time are the promise to whoever runs a board; the other
limits keep the work of one bundle within them, and are checked before anything is unpacked or decoded.
"""

from __future__ import annotations

# The bundle as a file.
BUNDLE_BYTES = 25_000_000
MEMBERS_COUNT = 2_500
UNPACKED_BYTES = 100_000_000  # of all members together
MEMBER_BYTES = 16_000_000
EXPANSION_RATIO = 100  # unpacked to packed bytes of one member: zeros reach 1032, tables and manifests 3
SMALL_MEMBER_BYTES = 10_000  # below this size no ratio is judged
NAME_BYTES = 200
PATH_PARTS_COUNT = 8

# Its parts.
MANIFEST_BYTES = 1_000_000
PLUGIN_FILES_COUNT = 200
PLUGIN_BYTES = 2_000_000
CONTACT_CHARACTERS, LICENCE_CHARACTERS = 200, 100

# Its tables.
ROWS_COUNT = 500
LAUNCHES_COUNT = 2_000
SAMPLES_COUNT = 3_000_000  # of all traces together; 16 bytes each once decoded, 8 in a bundle
SERIES_COUNT = 500  # of one trace
METRICS_COUNT = 1_000  # of one row or launch
FOOTER_BYTES = 500_000  # of one parquet file; ours have 3 to 16 kB
ROW_GROUPS_COUNT = 16
SCHEMA_DEPTH_COUNT = 16
TABLE_BYTES = 32_000_000  # of the rows of one table, decoded
CELL_BYTES = 4_000_000  # of one text

# The process that looks at it.
ADDRESS_SPACE_BYTES = 500_000_000
CPU_S = 10
WALL_S = 30.0  # of which it may wait for a core
AT_ONCE_COUNT = 2
OPEN_FILES_COUNT = 64
RESULT_BYTES = 1_000_000
FINDINGS_COUNT = 200
MESSAGE_CHARACTERS = 500
