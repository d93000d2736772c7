//! Compiles the kernels under `cuda/`: with nvcc under the feature `cuda`, with the host's C++ compiler and the
//! emulator under `emulate`. Never asks for a GPU.

use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rustc-check-cfg=cfg(gpu)");
    let cuda = std::env::var_os("CARGO_FEATURE_CUDA").is_some();
    let emulate = std::env::var_os("CARGO_FEATURE_EMULATE").is_some();
    if cuda || emulate {
        println!("cargo:rustc-cfg=gpu");
    }
    // with both, lib.rs says what is wrong
    #[cfg(any(feature = "cuda", feature = "emulate"))]
    match (cuda, emulate) {
        (true, false) => kernels::cuda(),
        (false, true) => kernels::emulated(),
        _ => {}
    }
}

/// All files below `folder` that end in `.extension`, in order.
#[allow(dead_code)]
fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files(&path, extension));
        } else if path.extension().is_some_and(|e| e == extension) {
            found.push(path);
        }
    }
    found.sort();
    found
}

#[cfg(any(feature = "cuda", feature = "emulate"))]
mod kernels {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Kernels that hold instructions of sm_90a alone stand in folders of this name.
    const HOPPER: &str = "sm90";

    fn sources() -> (Vec<PathBuf>, Vec<PathBuf>) {
        println!("cargo:rerun-if-changed=cuda");
        files(Path::new("cuda"), "cu").into_iter().partition(|p| !p.iter().any(|part| part == HOPPER))
    }

    pub fn emulated() {
        let mut build = cc::Build::new();
        build.cpp(true).std("c++17").opt_level(2).debug(false).warnings(false).flag("-xc++");
        let (plain, hopper) = sources();
        build.files(plain).files(hopper).file("cuda/emulate/simt.cpp").compile("smalti_kernels");
    }

    pub fn cuda() {
        for variable in ["SMALTI_CUDA_ARCH", "CUDA_HOME", "NVCC", "PATH"] {
            println!("cargo:rerun-if-env-changed={variable}");
        }
        let nvcc = nvcc();
        let (plain, hopper) = sources();
        let list = std::env::var("SMALTI_CUDA_ARCH").unwrap_or_else(|_| "80,90a,80+ptx".into());
        let mut everywhere = flags(&list);
        let here = ["-gencode=arch=compute_90a,code=sm_90a".to_string()];
        let with_hopper = list.split(',').any(|arch| arch.trim() == "90a");
        if !with_hopper {
            everywhere.push("-DSMALTI_NO_SM90".into());
        }
        let hopper = hopper.iter().filter(|_| with_hopper).map(|file| (file.as_path(), &here[..]));
        let plain = plain.iter().map(|file| (file.as_path(), &everywhere[..]));
        compile(&nvcc, &hopper.chain(plain).collect::<Vec<_>>());
        // pip's toolkit has `lib`, the installer's `lib64`
        if let Some(home) = nvcc.parent().and_then(Path::parent) {
            for lib in ["lib", "lib64"].map(|l| home.join(l)).iter().filter(|l| l.is_dir()) {
                println!("cargo:rustc-link-search=native={}", lib.display());
            }
        }
    }

    /// nvcc's flags for a list such as `80,90a,80+ptx`. Machine code of all architectures is made from the PTX of the
    /// lowest: these kernels use nothing newer, the code is the same, and nvcc's front end runs once instead of once for
    /// each, which is a quarter of the time.
    fn flags(list: &str) -> Vec<String> {
        let names: Vec<(&str, bool)> = list
            .split(',')
            .map(|a| a.trim())
            .map(|a| a.strip_suffix("+ptx").map_or((a, false), |sm| (sm, true)))
            .collect();
        let number = |sm: &str| match sm.trim_end_matches(char::is_alphabetic).parse::<u32>() {
            Ok(number) => number,
            Err(_) => {
                fail(&format!("SMALTI_CUDA_ARCH: `{sm}` is not an architecture such as 80, 90a or 80+ptx"))
            }
        };
        let lowest = names.iter().map(|&(sm, _)| number(sm)).min().unwrap_or(80);
        let flag = |&(sm, ptx): &(&str, bool)| {
            if ptx {
                format!("-gencode=arch=compute_{sm},code=compute_{sm}")
            } else {
                format!("-gencode=arch=compute_{lowest},code=sm_{sm}")
            }
        };
        names.iter().map(flag).collect()
    }

    /// Each file, with its flags, by itself: those of one `Build` cc makes relocatable and links for the device, and then
    /// every program holds all kernels twice.
    fn compile(nvcc: &Path, sources: &[(&Path, &[String])]) {
        // Not by way of `Build::compiler`: cc takes what is named there for a host compiler, and hands it that one's
        // flags unwrapped. A build script has one thread here, so the environment may be set.
        unsafe { std::env::set_var("NVCC", nvcc) };
        let jobs = std::env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
        let next = AtomicUsize::new(0);
        let worker = || {
            let mut objects = Vec::new();
            while let Some((source, flags)) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
                objects.extend(build(flags).file(source).cargo_metadata(false).compile_intermediates());
            }
            objects
        };
        let mut objects: Vec<PathBuf> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..jobs).map(|_| scope.spawn(worker)).collect();
            let done = |thread: std::thread::ScopedJoinHandle<Vec<PathBuf>>| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            threads.into_iter().flat_map(done).collect()
        });
        objects.sort();
        build(&[]).objects(objects).compile("smalti_kernels");
    }

    /// Not by way of `Build::debug`, which would pass -G and switch the optimiser off.
    fn build(flags: &[String]) -> cc::Build {
        let mut build = cc::Build::new();
        // the level is that of the launchers, the host's code; kernels are optimised whatever it is
        build.cuda(true).cudart("static").debug(false).opt_level(1).warnings(false);
        // by default machine code with line information is not compressed, which is most of a program
        build.std("c++17").flag("-lineinfo").flag("-Xfatbin=-compress-all");
        for flag in flags {
            build.flag(flag);
        }
        build
    }

    fn nvcc() -> PathBuf {
        let named = std::env::var_os("NVCC").map(PathBuf::from);
        let home = std::env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc"));
        let path = std::env::var_os("PATH").unwrap_or_default();
        let on_path = std::env::split_paths(&path).map(|folder| folder.join("nvcc"));
        let found = named.into_iter().chain(home).chain(on_path).find(|p| p.is_file());
        found.unwrap_or_else(|| {
            fail(
                "the feature `cuda` needs nvcc, and there is none in $NVCC, $CUDA_HOME/bin or on the PATH: \
                 install the CUDA toolkit 12 or newer, or `pip install nvidia-cuda-nvcc nvidia-cuda-runtime \
                 nvidia-cuda-crt nvidia-nvvm nvidia-cuda-cccl` and set CUDA_HOME to its nvidia/cu13 folder",
            )
        })
    }

    fn fail(message: &str) -> ! {
        eprintln!("error: {message}");
        std::process::exit(1)
    }
}
