//! Files made by hand, and the real program on them: how much memory and processor time it takes, and what it says.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// What no input may cost. Processor time and not wall time: the machine may be busy with other tests.
const MEMORY: u64 = 64 << 20;
const TIME: Duration = Duration::from_secs(2);

pub(crate) struct Lab(tempfile::TempDir);

/// A process that ended.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) status: ExitStatus,
    pub(crate) out: String,
    pub(crate) err: String,
    /// Most bytes of memory at any time.
    pub(crate) memory: u64,
    pub(crate) time: Duration,
}

impl Lab {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// A name in a directory of its own: what a bad image reaches beside it is not one of the test's.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        let dir = self.0.path().join("images");
        fs::create_dir_all(&dir).unwrap();
        dir.join(name)
    }

    pub(crate) fn file(&self, name: &str, bytes: &[u8]) -> String {
        self.large_file(name, bytes.len() as u64, &[(0, bytes)])
    }

    /// A file of `len` bytes, a hole but for `parts`.
    pub(crate) fn large_file(&self, name: &str, len: u64, parts: &[(u64, &[u8])]) -> String {
        let path = self.path(name);
        let file = File::create(&path).unwrap();
        file.set_len(len).unwrap();
        for (at, bytes) in parts {
            file.write_all_at(bytes, *at).unwrap();
        }
        path.to_str().unwrap().to_owned()
    }

    /// Writes the same bytes again and again behind the end of a file. In pieces: the memory of this process at the moment when it
    /// starts another is counted to that one.
    pub(crate) fn append(&self, file: &str, bytes: &[u8], times: usize) {
        let mut file = BufWriter::new(File::options().append(true).open(file).unwrap());
        for _ in 0..times {
            file.write_all(bytes).unwrap();
        }
        file.flush().unwrap();
    }

    /// Runs a verb to its end, inside the limits.
    pub(crate) fn vdisk(&self, args: &[&str]) -> Ran {
        let mut child = self.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (mut stdout, mut stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let out = std::thread::spawn(move || {
            let mut out = String::new();
            stdout.read_to_string(&mut out).unwrap();
            out
        });
        let mut err = String::new();
        stderr.read_to_string(&mut err).unwrap();
        let ran = ended(child, out.join().unwrap(), err);
        ran.check(args);
        ran
    }

    /// The program, which is killed if it hangs. What `timeout` and the program take counts as one.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command.args(["--kill-after=1", "60", env!("CARGO_BIN_EXE_vdisk")]).args(args).current_dir(self.0.path());
        command.stdin(Stdio::null());
        command
    }

    /// Every verb refuses the image: exit status 1 and one line with these words.
    pub(crate) fn refused(&self, image: &str, words: &[&str]) {
        for args in [&["info"][..], &["map"], &["serve", "--read-only", "--socket", "s"], &["serve", "--socket", "s"]] {
            self.fails(&[args, &[image]].concat(), words);
        }
    }

    /// An image whose parent is refused: nothing of it is served, and who only looks at it is told (exit status 0 or 1).
    pub(crate) fn parent_refused(&self, image: &str, words: &[&str]) {
        for mode in [&["serve", "--read-only", "--socket", "s"][..], &["serve", "--socket", "s"]] {
            self.fails(&[mode, &[image]].concat(), words);
        }
        for verb in ["info", "map"] {
            let ran = self.vdisk(&[verb, image]);
            assert!(words.iter().all(|w| ran.err.contains(w)), "{verb}: {words:?} not in {ran:?}");
        }
    }

    /// As [`Lab::refused`], only by what would write to it; others open it.
    pub(crate) fn refused_for_writing(&self, image: &str, words: &[&str]) {
        self.fails(&["serve", "--socket", "s", image], words);
        assert!(self.vdisk(&["info", image]).status.success());
    }

    fn fails(&self, args: &[&str], words: &[&str]) {
        let ran = self.vdisk(args);
        assert_eq!(ran.status.code(), Some(1), "{args:?}: {ran:?}");
        let last = ran.err.lines().last().unwrap_or_default();
        assert!(ran.out.is_empty() || args[0] == "map", "{args:?}: {ran:?}");
        assert!(words.iter().all(|w| last.contains(w)), "{args:?}: {words:?} not in {last}");
    }

    /// Looks at all of it, and reads all of it over NBD: what can be read is, what cannot is an error, and the server lives on.
    pub(crate) fn survives(&self, image: &str) {
        self.vdisk(&["info", image]);
        self.vdisk(&["map", "--json", image]);
        self.serve(&["--read-only", image], |server| {
            let _ = Command::new("nbdcopy").args([&server.uri, "null:"]).stderr(Stdio::null()).status().unwrap();
            server.io("read 0 512");
        });
    }

    /// Serves the image while `work` is done; the server then ends well and inside the limits.
    pub(crate) fn serve<T>(&self, options: &[&str], work: impl FnOnce(&Server) -> T) -> T {
        self.serve_measured(options, work).0
    }

    pub(crate) fn serve_measured<T>(&self, options: &[&str], work: impl FnOnce(&Server) -> T) -> (T, Ran) {
        let args = [&["serve", "--socket", "sock"], options].concat();
        let mut child = self.command(&args).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
        let mut said = Vec::new();
        let uri = loop {
            let line = lines.next().unwrap_or_else(|| panic!("{args:?} does not listen: {said:?}"));
            match line.strip_prefix("vdisk: listening on ") {
                Some(uri) => break uri.to_owned(),
                None => said.push(line),
            }
        };
        let server = Server { pid: child.id(), uri };
        let answer = work(&server);
        assert!(Command::new("kill").arg(server.pid.to_string()).status().unwrap().success());
        let rest = lines.collect::<Vec<_>>().join("\n");
        let ran = ended(child, String::new(), rest);
        ran.check(&args);
        // 124: `timeout` was told to end, passed that on, and says that it did.
        assert!(matches!(ran.status.code(), Some(0 | 124)), "{args:?}: {ran:?}");
        (answer, ran)
    }
}

pub(crate) struct Server {
    /// Of `timeout`, whose only child is the server.
    pid: u32,
    uri: String,
}

impl Server {
    /// Runs a command of qemu-io. What it says if it fails.
    pub(crate) fn try_io(&self, command: &str) -> Result<(), String> {
        let mode: &[&str] = if command.starts_with("read") { &["-r"] } else { &[] };
        let args = [mode, &["-f", "raw", "-c", command, &self.uri]].concat();
        let output = Command::new("qemu-io").args(args).output().unwrap();
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        // It is not always in the status.
        if output.status.success() && !said.contains("failed") { Ok(()) } else { Err(said) }
    }

    /// Runs reads of qemu-io, none of which may fail.
    pub(crate) fn read_all(&self, commands: &[String]) {
        let args = commands.iter().flat_map(|c| ["-c", c]);
        let output = Command::new("qemu-io").args(["-r", "-f", "raw", &self.uri]).args(args).output().unwrap();
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success() && !said.contains("failed"), "{said}");
    }

    /// As [`Server::try_io`], whatever comes of it.
    pub(crate) fn io(&self, command: &str) {
        let _ = self.try_io(command);
    }

    pub(crate) fn fails(&self, command: &str) {
        let said = self.try_io(command).map(|()| "no failure".to_owned()).unwrap_or_else(|said| said);
        assert!(said.contains("Input/output error"), "{command}: {said}");
    }

    /// The process that serves.
    pub(crate) fn process(&self) -> PathBuf {
        let is_child = |dir: &PathBuf| {
            let stat = fs::read_to_string(dir.join("stat")).unwrap_or_default();
            let parent = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(1)?.parse().ok());
            parent == Some(self.pid)
        };
        fs::read_dir("/proc").unwrap().map(|e| e.unwrap().path()).find(is_child).unwrap()
    }
}

impl Ran {
    /// A process that is started begins with the memory of the one that starts it, as the kernel counts: after a test that
    /// failed, with the backtrace of that.
    pub(crate) fn check_memory(&self, limit: u64) {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let own = status.lines().find_map(|l| l.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")).unwrap();
        let limit = limit.max((own.trim().parse::<u64>().unwrap() << 10) + 1);
        assert!(self.memory < limit, "{} KiB of memory: {self:?}", self.memory >> 10);
    }

    fn check(&self, args: &[&str]) {
        assert!(self.status.signal().is_none() && !self.err.contains("panicked"), "{args:?}: {self:?}");
        self.check_memory(MEMORY);
        assert!(self.time < TIME, "{args:?}: {:?} of processor time", self.time);
    }
}

/// Waits for a process, with what it took.
#[expect(unsafe_code, reason = "the standard library does not tell what a process took")]
fn ended(child: Child, out: String, err: String) -> Ran {
    let pid = i32::try_from(child.id()).unwrap();
    let mut status = 0;
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: both pointers are to memory of their type that lives until after the call, and `child`, which nobody else waits
    // for, is not used any more.
    let waited = unsafe { libc::wait4(pid, &raw mut status, 0, usage.as_mut_ptr()) };
    assert_eq!(waited, pid);
    // SAFETY: all bytes were zeroed, which is an rusage of nothing, and wait4 has written the real one.
    let usage = unsafe { usage.assume_init() };
    let time = |t: libc::timeval| {
        Duration::from_secs(u64::try_from(t.tv_sec).unwrap()) + Duration::from_micros(u64::try_from(t.tv_usec).unwrap())
    };
    Ran {
        status: ExitStatus::from_raw(status),
        out,
        err,
        memory: u64::try_from(usage.ru_maxrss).unwrap() << 10,
        time: time(usage.ru_utime) + time(usage.ru_stime),
    }
}
