//! Fails closed where a part of the trail is lost: a key that is not found may have been used, so it is refused.
//!
//! That holds until a window has passed, or until an operator accepts the loss. Known keys are answered as ever, and calls
//! without a key are not affected.

use std::sync::{MutexGuard, PoisonError};

use super::claims::KeyDecision;
use super::refusal::Refused;
use super::{Idempotency, now};
use crate::audit::loss;
use crate::audit::loss::{Loss, LostPart};

impl Idempotency {
    /// Refuses a key that is not found, if a part of the trail is lost.
    pub(super) fn check_loss(&self, decision: &KeyDecision) -> Result<(), Refused> {
        // With a doubt the key is known: the call repeats it by force.
        let is_new = matches!(decision, KeyDecision::Begin { repeats: None });
        if is_new && self.is_lost() { Err(Refused::Lost) } else { Ok(()) }
    }

    /// The loss of a part of the trail; `None` if there is none, if it was accepted, or once the window is over.
    pub fn loss(&self) -> Option<Loss> {
        self.present_loss().as_ref().map(|(loss, _)| loss.clone())
    }

    /// Whether [`Self::loss`] would return one. Copies nothing, since each call with a key asks for it.
    pub(super) fn is_lost(&self) -> bool {
        self.present_loss().is_some()
    }

    /// Returns the loss that still matters, and until when it matters, in seconds since 1970. Clears a loss whose window is
    /// over.
    pub(super) fn present_loss(&self) -> MutexGuard<'_, Option<(Loss, u32)>> {
        // Ends here instead of by a timer: nothing else depends on the moment.
        let mut loss = self.loss.lock().unwrap_or_else(PoisonError::into_inner);
        if loss.as_ref().is_some_and(|(_, until)| *until < now()) {
            *loss = None;
            self.audit.set_damaged(false);
        }
        loss
    }

    /// Applies a loss that the rebuild has found: for `window` seconds from now on, keys that are not found are refused. If the
    /// operator has accepted this loss, by naming its word, records that in the trail instead.
    pub(super) fn lose(&self, loss: Loss, window: u32) {
        let Loss { first: LostPart { file, line, reason, .. }, word, .. } = &loss;
        if self.accept_loss.as_ref() == Some(word) {
            tracing::warn!(
                file,
                line,
                reason,
                "a part of the audit trail is lost, and the loss was accepted"
            );
            // The record keeps the next start from refusing again. It names the faults of this loss, so that it covers no later
            // damage.
            self.audit.event(loss::ACCEPTED, loss.details());
            return;
        }
        tracing::warn!(
            file,
            line,
            reason,
            word,
            "a part of the audit trail is lost: Idempotency-Keys that are not found get 503; restore it, or accept the loss \
             with `ccsqm-gateway audit accept-loss` or `serve --accept-loss=<word>`"
        );
        self.audit.set_damaged(true);
        *self.loss.lock().unwrap_or_else(PoisonError::into_inner) =
            Some((loss, now().saturating_add(window)));
    }
}
