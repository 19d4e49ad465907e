"""Runs the SQL of docs/served-features.md in the current folder, and prints the training table as JSON.

python tests/clients/training_table.py docs/served-features.md
"""

import json
import re
import sys
from pathlib import Path

import duckdb


def main() -> None:
    statements = re.findall(r"^```sql\n(.*?)^```$", Path(sys.argv[1]).read_text(), re.MULTILINE | re.DOTALL)
    assert len(statements) == 3, f"{len(statements)} blocks of SQL found"
    connection = duckdb.connect()
    results = [connection.execute(statement).fetchall() for statement in statements]
    table = duckdb.sql("SELECT request_id, item_id, user_id, clicked, mid_emb, cvr FROM 'training.parquet'")
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.fetchall()]
    print(json.dumps({"digests": [row[0] for row in results[1]], "rows": rows}))


if __name__ == "__main__":
    main()
