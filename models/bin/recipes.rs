//! `smalti recipes`

use smalti::{Error, Result};
use smalti_models::train::{
    Recipe,
    recipe::{BUILTIN, nearest},
};
use std::process::ExitCode;

pub fn run(name: Option<&str>) -> Result<ExitCode> {
    if let Some(name) = name {
        let Some((_, text)) = BUILTIN.iter().find(|(builtin, _)| *builtin == name) else {
            let near = nearest(name, BUILTIN.iter().map(|(name, _)| *name));
            let near = near.map_or(String::new(), |near| format!("; did you mean `{near}`?"));
            return Err(Error::msg(format!("there is no built-in recipe {name}{near}")));
        };
        print!("{text}");
        return Ok(ExitCode::SUCCESS);
    }
    for (name, text) in BUILTIN {
        let recipe = Recipe::load(name, &[])?;
        let about = text.lines().next().unwrap_or_default().trim_start_matches("# ");
        println!("{name:<28} {about} [{}]", recipe.schedule.length());
    }
    Ok(ExitCode::SUCCESS)
}
