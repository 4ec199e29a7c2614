//! What providers load beside onnxruntime's library: WebGPU's plugin, CUDA's libraries. Files are found next to the
//! library or in the Python packages beside its own.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::library::Library;

/// Loads CUDA's and cuDNN's libraries from their Python packages if they are installed beside this one. Where they
/// are not, the system's loader looks for them, and its complaint is the one to show.
pub(crate) fn preload_cuda(library: &Library) {
    let packages = library.path.ancestors().nth(3).map(|site| site.join("nvidia"));
    if let Some(packages) = packages.filter(|folder| folder.is_dir()) {
        let (cuda, cudnn) = (packages.join("cu13/lib"), packages.join("cudnn/lib"));
        let _ = ort::ep::cuda::preload_dylibs(Some(&cuda), None);
        let _ = ort::ep::cuda::preload_dylibs(None, Some(&cudnn));
    }
}

/// Registers WebGPU's plugin, once per process.
///
/// # Errors
/// Where it was looked for, or why it cannot be loaded.
pub(crate) fn register_webgpu(library: &Library) -> Result<(), String> {
    static REGISTERED: OnceLock<Result<(), String>> = OnceLock::new();
    let register = || {
        let name = match std::env::consts::OS {
            "windows" => "onnxruntime_providers_webgpu.dll",
            "macos" => "libonnxruntime_providers_webgpu.dylib",
            _ => "libonnxruntime_providers_webgpu.so",
        };
        let beside = library.path.parent().unwrap_or(Path::new(""));
        let package = library.path.ancestors().nth(3).map(|site| site.join("onnxruntime_ep_webgpu"));
        let folders: Vec<PathBuf> = [Some(beside.to_owned()), package].into_iter().flatten().collect();
        let Some(plugin) = folders.iter().map(|folder| folder.join(name)).find(|path| path.is_file()) else {
            let folders: Vec<String> = folders.iter().map(|f| format!("`{}`", f.display())).collect();
            return Err(format!(
                "the onnxruntime library was built without it, and its plugin `{name}` is not in {}",
                folders.join(" or ")
            ));
        };
        let registered = library.environment.register_ep_library("dmd-webgpu", &plugin);
        registered.map_err(|e| format!("its plugin `{}` cannot be loaded: {e}", plugin.display()))
    };
    REGISTERED.get_or_init(register).clone()
}
