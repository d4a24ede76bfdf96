# Runs the interpreter's own tests whose names are given, where they are installed, and those below, and
# prints what became of each: no times, and nothing else that differs from run to run.
import ctypes, errno, hashlib, importlib.util, json, mmap, multiprocessing, os, pickle, queue, random
import shutil, signal, subprocess, sys, tempfile, threading, unittest, zlib


class Memory(unittest.TestCase):
    def test_maps_come_and_go(self):
        for pages in range(1, 150):
            with mmap.mmap(-1, pages * mmap.PAGESIZE) as area:
                area[-1] = pages
                self.assertEqual(area[-1], pages)

    def test_a_map_of_a_file_grows_and_shrinks(self):
        with tempfile.TemporaryFile() as file:
            file.truncate(4 * mmap.PAGESIZE)
            with mmap.mmap(file.fileno(), 4 * mmap.PAGESIZE) as area:
                area[:4] = b"kept"
                for pages in [8, 64, 2, 1, 16]:
                    area.resize(pages * mmap.PAGESIZE)
                    self.assertEqual(os.fstat(file.fileno()).st_size, pages * mmap.PAGESIZE)
                    self.assertEqual(area[:4], b"kept")

    def test_what_is_discarded_reads_as_zeroes(self):
        with mmap.mmap(-1, 64 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
            area.write(b"x" * (64 * mmap.PAGESIZE))
            area.madvise(mmap.MADV_DONTNEED, mmap.PAGESIZE, 62 * mmap.PAGESIZE)
            self.assertEqual(area[0:1] + area[mmap.PAGESIZE:mmap.PAGESIZE + 1], b"x\0")
            self.assertEqual(area.find(b"x", mmap.PAGESIZE), 63 * mmap.PAGESIZE)

    def test_rights_and_errors_are_the_kernels(self):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for address, length, error in [(1, 4096, "EINVAL"), (4096, 4096, "ENOMEM"), (0, 0, None)]:
            result = libc.mprotect(address, length, mmap.PROT_READ)
            found = errno.errorcode[ctypes.get_errno()] if result else None
            self.assertEqual(found, error)

    def test_large_objects_move_as_they_grow(self):
        random.seed(7)
        pieces = [bytearray(1 << 18) for _ in range(24)]
        for step in range(200):
            piece = random.choice(pieces)
            piece[0] = step % 256
            piece.extend(bytes(1 << 16))
            self.assertEqual((piece[0], piece[-1]), (step % 256, 0))


class Processes(unittest.TestCase):
    def test_children_have_what_they_inherit(self):
        data = {n: str(n) * 50 for n in range(10000)}
        for _ in range(4):
            child = os.fork()
            if child == 0:
                os._exit(sum(len(text) for text in data.values()) % 251)
            status = os.waitpid(child, 0)[1]
            self.assertEqual(os.waitstatus_to_exitcode(status), sum(map(len, data.values())) % 251)

    def test_programs_are_started(self):
        for status in range(5):
            script = f"echo {status} | cat; exit {status}"
            done = subprocess.run(["sh", "-c", script], capture_output=True, check=False)
            self.assertEqual((done.returncode, done.stdout), (status, b"%d\n" % status))

    def test_a_pool_of_processes_agrees(self):
        context = multiprocessing.get_context("fork")
        with context.Pool(3) as pool:
            self.assertEqual(pool.map(abs, range(-500, 0)), list(range(500, 0, -1)))

    def test_a_signal_ends_a_child(self):
        child = subprocess.Popen(["sleep", "100"])
        child.send_signal(signal.SIGTERM)
        self.assertEqual(child.wait(60), -signal.SIGTERM)


class Threads(unittest.TestCase):
    def test_threads_come_and_go(self):
        done = queue.Queue()
        for n in range(100):
            thread = threading.Thread(target=lambda n=n: done.put(sum(range(n))))
            thread.start()
            thread.join()
        self.assertEqual(sum(done.get() for _ in range(100)), sum(sum(range(n)) for n in range(100)))

    def test_threads_change_memory_at_once(self):
        def work(seed):
            for n in range(100):
                with mmap.mmap(-1, (1 + (n * seed) % 9) * mmap.PAGESIZE) as area:
                    area[0] = seed
                    wrong.extend([seed] if area[0] != seed else [])
        wrong = []
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [])


class Libraries(unittest.TestCase):
    def test_what_is_packed_is_unpacked(self):
        data = random.Random(3).randbytes(1 << 20) + bytes(1 << 20)
        self.assertEqual(zlib.decompress(zlib.compress(data)), data)
        self.assertEqual(pickle.loads(pickle.dumps([data, {"a": data}])), [data, {"a": data}])
        text = json.dumps({str(n): list(range(n % 20)) for n in range(5000)})
        print(hashlib.sha256(text.encode()).hexdigest())
        self.assertEqual(len(json.loads(text)), 5000)

    def test_files_are_copied(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "a")
            with open(path, "wb") as file:
                file.write(random.Random(5).randbytes(3 << 20))
            shutil.copy(path, path + "b")
            with open(path, "rb") as one, open(path + "b", "rb") as other:
                self.assertEqual(one.read(), other.read())


class Outcomes(unittest.TestResult):
    """Prints what became of each test."""

    def say(self, test, outcome):
        print(outcome, test.id())

    def addSuccess(self, test):
        self.say(test, "passed")

    def addSkip(self, test, reason):
        self.say(test, "skipped")

    def addExpectedFailure(self, test, error):
        self.say(test, "failed as expected")

    def addError(self, test, error):
        super().addError(test, error)
        self.say(test, "FAILED")

    addFailure = addError

    def addSubTest(self, test, subtest, error):
        if error is not None:
            self.addError(test, error)


if __name__ == "__main__":
    suite = unittest.defaultTestLoader.loadTestsFromModule(sys.modules[__name__])
    for name in sys.argv[1:]:
        if importlib.util.find_spec("test") and importlib.util.find_spec(f"test.{name}"):
            suite.addTests(unittest.defaultTestLoader.loadTestsFromName(f"test.{name}"))
    outcomes = Outcomes()
    suite.run(outcomes)
    for test, error in outcomes.errors:
        print(test.id(), error, file=sys.stderr)
    print(outcomes.testsRun, "tests")
    sys.exit(0 if outcomes.wasSuccessful() else 1)
