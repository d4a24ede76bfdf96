# Builds a dictionary of N entries and looks many of them up, in a random order.
import hashlib
import sys

n = int(sys.argv[1])
table = {"key%d" % i: [i, "value %d" % (i * 7)] for i in range(n)}
digest = hashlib.sha256()
x = 12345
for _ in range(n // 4):
    x = (x * 6364136223846793005 + 1442695040888963407) % 2**64
    digest.update(repr(table["key%d" % (x % n)]).encode())
for key in sorted(table)[::37]:
    digest.update(key.encode())
print(len(table), digest.hexdigest())
