//! What is missing where a provider cannot be had, and the command that mends it: texts and nothing else.

use std::path::{Path, PathBuf};

use crate::Provider;

/// Why a provider cannot be had on this operating system at all.
pub(crate) fn other_system(provider: Provider) -> Option<String> {
    let (name, system, there) = match provider {
        Provider::Coreml => ("CoreML", "macOS", cfg!(target_os = "macos")),
        Provider::Directml => ("DirectML", "Windows", cfg!(windows)),
        _ => return None,
    };
    (!there).then(|| format!("{name} is part of {system}; this is {}", std::env::consts::OS))
}

/// How to get a library that has the provider.
pub(crate) fn other_library(provider: Provider) -> String {
    let package = match provider {
        _ if other_system(provider).is_some() => {
            return "take another provider, `--provider cpu` runs everywhere".to_owned();
        }
        Provider::Cuda | Provider::Tensorrt => "onnxruntime-gpu",
        Provider::Directml => "onnxruntime-directml",
        Provider::Openvino => "onnxruntime-openvino",
        Provider::Webgpu => {
            return "`pip install onnxruntime onnxruntime-ep-webgpu` in an active virtual environment"
                .to_owned();
        }
        Provider::Xnnpack => {
            return "build onnxruntime's source with `./build.sh --config Release --build_shared_lib --use_xnnpack`, then \
                    name the library with --ort-lib; no package has it"
                .to_owned();
        }
        Provider::Auto | Provider::Engine | Provider::Tract | Provider::Cpu | Provider::Coreml => {
            "onnxruntime"
        }
    };
    format!("`pip install {package}` in a virtual environment of its own, active or named with --ort-lib")
}

/// What the provider needs from the machine.
pub(crate) fn driver(provider: Provider) -> String {
    match provider {
        Provider::Cuda | Provider::Tensorrt => {
            "install NVIDIA's driver (Debian: `apt install nvidia-driver`); `nvidia-smi` then shows the GPU"
        }
        Provider::Webgpu => {
            "install a driver for Vulkan (Debian: `apt install mesa-vulkan-drivers`); `vulkaninfo` then shows the GPU"
        }
        _ => "another onnxruntime library may help, see --ort-lib",
    }
    .to_owned()
}

/// Reason and remedy for what onnxruntime said when it refused a provider.
pub(crate) fn explain(provider: Provider, message: &str) -> (String, String) {
    if !matches!(provider, Provider::Cuda | Provider::Tensorrt) {
        return (message.to_owned(), driver(provider));
    }
    explain_cuda(provider, message, find_driver().is_some())
}

fn explain_cuda(provider: Provider, message: &str, has_driver: bool) -> (String, String) {
    let missing = missing_library(message);
    let is_driver = missing.is_some_and(|name| name.starts_with("libcuda.so") || name.starts_with("nvcuda"));
    let reason = match missing {
        Some(name) if is_driver => {
            format!("`{name}`, the library of NVIDIA's driver, is missing ({message})")
        }
        Some(name) if has_driver => format!("the library `{name}` is missing ({message})"),
        Some(name) => {
            format!("NVIDIA's driver is missing (`{DRIVER}`), and so is the library `{name}` ({message})")
        }
        None if has_driver => message.to_owned(),
        None => format!("NVIDIA's driver is missing (`{DRIVER}`): {message}"),
    };
    let toolkit = match missing {
        Some(name) if name.contains("nvinfer") => {
            Some("`pip install tensorrt` and put its folder `tensorrt_libs` on LD_LIBRARY_PATH")
        }
        Some(_) if !is_driver => Some("`pip install 'onnxruntime-gpu[cuda,cudnn]'` beside the library"),
        _ => None,
    };
    let remedy = match toolkit {
        Some(toolkit) if has_driver => toolkit.to_owned(),
        Some(toolkit) => format!("{}; then {toolkit}", driver(provider)),
        None if has_driver && !is_driver => "`nvidia-smi` says whether GPU and driver work".to_owned(),
        None => driver(provider),
    };
    (reason, remedy)
}

/// What the driver's library is called.
const DRIVER: &str = if cfg!(windows) { "nvcuda.dll" } else { "libcuda.so.1" };

fn find_driver() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).unwrap_or_default();
    let mut folders: Vec<PathBuf> =
        std::env::split_paths(&variable(if cfg!(windows) { "PATH" } else { "LD_LIBRARY_PATH" })).collect();
    folders.extend(
        ["/usr/lib", "/usr/lib64", "/usr/lib/wsl/lib", "/usr/local/cuda/compat", "/run/opengl-driver/lib"]
            .map(PathBuf::from),
    );
    folders.push(format!("/usr/lib/{}-linux-gnu", std::env::consts::ARCH).into());
    folders.push(Path::new(&variable("SystemRoot")).join("System32"));
    folders.into_iter().map(|folder| folder.join(DRIVER)).find(|path| path.is_file())
}

/// The library that the loader did not find, as Linux and Windows put it.
fn missing_library(message: &str) -> Option<&str> {
    if let Some((before, _)) = message.split_once(": cannot open shared object file") {
        return before.split_whitespace().next_back();
    }
    let (_, after) = message.split_once("which depends on \"")?;
    Some(after.split_once("\" which is missing")?.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOADER: &str = "Failed to load library libonnxruntime_providers_cuda.so with error: ";

    #[test]
    fn the_missing_library_is_named_first() {
        let message =
            |name: &str| format!("{LOADER}{name}: cannot open shared object file: No such file or directory");
        let explained = |name: &str, driver| explain_cuda(Provider::Cuda, &message(name), driver);
        let (reason, remedy) = explained("libcuda.so.1", false);
        assert!(reason.starts_with("`libcuda.so.1`, the library of NVIDIA's driver, is missing"), "{reason}");
        assert!(remedy.contains("nvidia-driver"), "{remedy}");
        let (reason, remedy) = explained("libcublasLt.so.13", true);
        assert!(reason.starts_with("the library `libcublasLt.so.13` is missing"), "{reason}");
        assert!(remedy.starts_with("`pip install 'onnxruntime-gpu[cuda,cudnn]'`"), "{remedy}");
        let (reason, remedy) = explained("libnvinfer.so.10", false);
        assert!(reason.contains("`libcuda.so.1`") && reason.contains("`libnvinfer.so.10`"), "{reason}");
        assert!(remedy.contains("nvidia-driver") && remedy.contains("pip install tensorrt"), "{remedy}");
    }

    #[test]
    fn what_is_no_missing_library_keeps_the_words_of_onnxruntime() {
        let (reason, remedy) = explain_cuda(Provider::Cuda, "CUDA failure 100: no CUDA-capable device", true);
        assert_eq!(reason, "CUDA failure 100: no CUDA-capable device");
        assert!(remedy.contains("nvidia-smi"), "{remedy}");
        let windows =
            "Error loading \"providers_cuda.dll\" which depends on \"cublasLt64_13.dll\" which is missing.";
        assert_eq!(missing_library(windows), Some("cublasLt64_13.dll"));
        assert_eq!(missing_library("out of memory"), None);
        assert_eq!(explain(Provider::Webgpu, "no adapter").0, "no adapter");
    }

    #[test]
    fn every_provider_has_a_command_that_mends_it() {
        for provider in Provider::ALL {
            let remedy = other_library(provider);
            assert!(remedy.contains('`'), "{provider}: {remedy}");
        }
        let system = [Provider::Coreml, Provider::Directml].map(|p| other_system(p).is_none());
        assert_eq!(system, [cfg!(target_os = "macos"), cfg!(windows)]);
    }
}
