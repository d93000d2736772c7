//! The folder of a run.

use super::Recipe;
use image::RgbImage;
use smalti::{Error, Result};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// A folder with one run: its recipe, its log, its training state, its pictures.
#[derive(Clone, Debug)]
pub struct RunDir(PathBuf);

const RECIPE: &str = "recipe.toml";
const METRICS: &str = "metrics.jsonl";
const STATE: &str = "last.safetensors";

impl RunDir {
    /// A new run in the folder `path`, which may exist but must not hold a run.
    ///
    /// # Errors
    /// If it holds one, is a file, or cannot be made.
    pub fn create(path: &Path, recipe: &Recipe) -> Result<RunDir> {
        RunDir::check_free(path)?;
        fs::create_dir_all(path).map_err(|e| Error::io(path, e))?;
        let run = RunDir(path.into());
        run.set_recipe(recipe)?;
        Ok(run)
    }

    /// Whether a new run may be made in the folder `path`; nothing is written.
    ///
    /// # Errors
    /// If it holds a run or is no folder.
    pub fn check_free(path: &Path) -> Result<()> {
        if path.exists() && !path.is_dir() {
            return Err(Error::format(path, "is no folder"));
        }
        if let Some(found) = [RECIPE, METRICS, STATE].iter().find(|name| path.join(name).exists()) {
            let what =
                format!("holds a run already ({found}); take another --out, or go on with it by --resume");
            return Err(Error::format(path, what));
        }
        Ok(())
    }

    /// Writes the recipe.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn set_recipe(&self, recipe: &Recipe) -> Result<()> {
        self.write(RECIPE, recipe.to_toml()?.as_bytes())
    }

    /// A new run in `runs/<name>`, or the first of `runs/<name>-2`, `-3`, .. that is free.
    ///
    /// # Errors
    /// If the folder cannot be made.
    pub fn create_numbered(runs: &Path, name: &str, recipe: &Recipe) -> Result<RunDir> {
        let free = (1..).map(|n| numbered(runs, name, n)).find(|path| !path.exists());
        RunDir::create(&free.unwrap_or_else(|| runs.join(name)), recipe)
    }

    /// The run in the folder `path`, with its recipe.
    ///
    /// # Errors
    /// If there is none, or the recipe does not parse.
    pub fn open(path: &Path, overrides: &[String]) -> Result<(RunDir, Recipe)> {
        let run = RunDir(path.into());
        for name in [RECIPE, STATE] {
            if !path.join(name).is_file() {
                let what = format!("holds no run to resume: there is no {name}");
                return Err(Error::format(path, what));
            }
        }
        let text = fs::read_to_string(run.file(RECIPE)).map_err(|e| Error::io(run.file(RECIPE), e))?;
        let recipe = Recipe::parse(&run.file(RECIPE), &text, overrides)?;
        Ok((run, recipe))
    }

    /// The last of the numbered runs `runs/<name>`.
    ///
    /// # Errors
    /// If there is none.
    pub fn last_numbered(runs: &Path, name: &str) -> Result<PathBuf> {
        let taken = (1..).map(|n| numbered(runs, name, n)).take_while(|path| path.exists());
        taken.last().ok_or_else(|| Error::format(runs.join(name), "there is no run here to resume"))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// A file in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The log.
    pub fn metrics(&self) -> PathBuf {
        self.file(METRICS)
    }

    /// The training state.
    pub fn state(&self) -> PathBuf {
        self.file(STATE)
    }

    /// Writes a file whole or not at all.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let (path, temporary) = (self.file(name), self.file(&format!("{name}.tmp")));
        fs::write(&temporary, bytes).map_err(|e| Error::io(&temporary, e))?;
        fs::rename(&temporary, &path).map_err(|e| Error::io(&path, e))
    }

    /// Writes a picture as PNG.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn picture(&self, name: &str, picture: &RgbImage) -> Result<()> {
        let mut bytes = std::io::Cursor::new(Vec::new());
        let failed = |e: image::ImageError| Error::format(self.file(name), e.to_string());
        picture.write_to(&mut bytes, image::ImageFormat::Png).map_err(failed)?;
        self.write(name, bytes.get_ref())
    }
}

fn numbered(runs: &Path, name: &str, number: usize) -> PathBuf {
    if number == 1 { runs.join(name) } else { runs.join(format!("{name}-{number}")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_never_overwritten() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let recipe = Recipe::load("mae_digits", &[])?;
        let run = RunDir::create(&folder.path().join("a"), &recipe)?;
        assert!(RunDir::create(run.path(), &recipe).unwrap_err().to_string().contains("holds a run"));
        assert!(RunDir::open(run.path(), &[]).unwrap_err().to_string().contains("no last.safetensors"));
        assert!(
            RunDir::open(&folder.path().join("b"), &[]).unwrap_err().to_string().contains("no recipe.toml")
        );
        fs::write(run.state(), b"state").unwrap();
        let (_, again) = RunDir::open(run.path(), &["schedule.epochs=500".into()])?;
        assert_eq!(again.schedule.epochs, 500);
        let file = folder.path().join("file");
        fs::write(&file, b"x").unwrap();
        assert!(RunDir::create(&file, &recipe).is_err());
        for name in ["r", "r-2", "r-3"] {
            assert_eq!(
                RunDir::create_numbered(folder.path(), "r", &recipe)?.path(),
                folder.path().join(name)
            );
        }
        assert_eq!(RunDir::last_numbered(folder.path(), "r")?, folder.path().join("r-3"));
        assert!(RunDir::last_numbered(folder.path(), "q").is_err());
        Ok(())
    }
}
