# Makes a table of N rows in memory with an index, and asks, changes and deletes.
import hashlib
import sqlite3
import sys

n = int(sys.argv[1])
base = sqlite3.connect(":memory:")
base.execute("create table t(a integer primary key, b text, c integer)")


def rows():
    x = 1
    for i in range(n):
        x = (x * 6364136223846793005 + 1442695040888963407) % 2**64
        yield i, "row %d %d %s" % (i, x, "x" * (x % 120)), x % 1000003


base.executemany("insert into t values(?, ?, ?)", rows())
base.execute("create index i on t(c)")
digest = hashlib.sha256()
for row in base.execute("select c, count(*), max(b) from t where c % 7 = 0 group by c order by c"):
    digest.update(repr(row).encode())
base.execute("update t set b = b || 'x' where c % 3 = 0")
base.execute("delete from t where c % 5 = 0")
for row in base.execute("select sum(a), count(*), sum(length(b)) from t"):
    digest.update(repr(row).encode())
print(digest.hexdigest())
