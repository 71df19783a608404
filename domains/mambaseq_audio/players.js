// what `players.grid` does in a page: see there
(() => {
  if (window.mambaseqListens) return;
  window.mambaseqListens = true;
  const every = (one, what) => [...one.querySelectorAll(what)];
  const sound = clip => clip.querySelector('audio');
  let chain = false;
  const stop = but => every(document, 'audio').forEach(a => {
    if (a !== but && !a.paused) { a.pause(); a.currentTime = 0; }
  });
  const mark = () => every(document, '.listen .clip').forEach(clip => {
    const a = sound(clip);
    if (!a) return;
    clip.classList.toggle('playing', !a.paused);
    const part = a.duration ? a.currentTime / a.duration : 0;
    clip.style.setProperty('--at', a.paused && !part ? '-4px' : 100 * part * (+clip.dataset.wide || 1) + '%');
  });
  const tick = () => { mark(); if (every(document, 'audio').some(a => !a.paused)) requestAnimationFrame(tick); };
  const play = (clip, from) => {
    const a = sound(clip);
    if (!a) return;
    if (from === undefined && !a.paused) { a.pause(); a.currentTime = 0; return; }
    if (from !== undefined || a.ended) a.currentTime = from || 0;
    a.play().catch(() => {});
  };
  document.addEventListener('play', event => { stop(event.target); requestAnimationFrame(tick); }, true);
  document.addEventListener('pause', mark, true);
  document.addEventListener('ended', event => {
    mark();
    const clip = event.target.closest('.listen .clip');
    if (!chain || !clip) return;
    let next = clip.nextElementSibling;
    while (next && !sound(next)) next = next.nextElementSibling;
    if (next) play(next, 0); else chain = false;
  }, true);

  const begin = () => every(document, '.listen').forEach(listen => {
    const rows = every(listen, '.heard'), told = listen.querySelector('.told');
    const hide = listen.querySelector('.hide');
    const first = rows.map(row => every(row, '.clip'));
    every(listen, '.controls, .heard h3, .clip').forEach(one => one.classList.add('on'));
    const label = (clip, words) => {
      (clip.querySelector('figcaption span') || clip.querySelector('figcaption')).textContent = words;
      every(clip, '[aria-label]').forEach(one => one.setAttribute('aria-label', clip.dataset.row + ', ' + words));
    };
    const reveal = () => {
      const votes = {};
      first.forEach((clips, r) => {
        clips.forEach(clip => {
          rows[r].querySelector('.cells').append(clip);
          const letter = clip.dataset.letter ? ' (was ' + clip.dataset.letter + ')' : '';
          label(clip, clip.dataset.name + letter);
          if (clip.classList.contains('chosen')) votes[clip.dataset.name] = (votes[clip.dataset.name] || 0) + 1;
        });
      });
      const said = Object.entries(votes).sort((a, b) => b[1] - a[1]).map(([name, n]) => name + ' (' + n + ')');
      told.textContent = said.length ? 'Chosen as the best: ' + said.join(', ') + '.' : '';
      listen.classList.remove('blind');
      hide.textContent = 'Hide the names';
    };
    const conceal = () => {
      stop();
      first.forEach((clips, r) => {
        const order = clips.map(clip => [Math.random(), clip]).sort((a, b) => a[0] - b[0]);
        order.forEach(([_, clip], k) => {
          clip.classList.remove('chosen');
          clip.dataset.letter = String.fromCharCode(65 + k % 26) + (k < 26 ? '' : 1 + Math.floor(k / 26));
          rows[r].querySelector('.cells').append(clip);
          label(clip, clip.dataset.letter);
        });
      });
      told.textContent = 'The order of each row is drawn by lot.';
      listen.classList.add('blind');
      hide.textContent = 'Show the names';
    };
    const turn = () => listen.classList.contains('blind') ? reveal() : conceal();
    const vote = clip => {
      if (!listen.classList.contains('blind')) return;
      const was = clip.classList.contains('chosen');
      every(clip.parentElement, '.clip').forEach(one => one.classList.remove('chosen'));
      clip.classList.toggle('chosen', !was);
    };
    const all = row => {
      const clip = every(row, '.clip').find(sound);
      if (clip) { stop(); chain = true; play(clip, 0); }
    };
    listen.addEventListener('click', event => {
      const clip = event.target.closest('.clip'), row = event.target.closest('.heard');
      if (event.target.closest('.vote')) vote(clip);
      else if (event.target.closest('.hide')) turn();
      else if (event.target.closest('.all')) all(row);
      else if (event.target.closest('.play')) {
        chain = false;
        play(clip);
      }
    });
    document.addEventListener('keydown', event => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (/^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName)) return;
      const here = event.target.closest && event.target.closest('.listen');
      if (here ? here !== listen : listen !== document.querySelector('.listen')) return;
      const clip = here && event.target.closest('.clip');
      const row = (here && event.target.closest('.heard')) || rows[0];
      if (!row) return;
      const clips = every(row, '.clip'), key = event.key.toLowerCase();
      const go = (r, k) => {
        const to = rows[r] && every(rows[r], '.clip')[k];
        const button = to && to.querySelector('.play');
        if (button) { button.focus(); event.preventDefault(); }
      };
      const r = rows.indexOf(row), k = clips.indexOf(clip);
      if (key === 'escape') { chain = false; stop(); }
      else if (key === 'b') turn();
      else if (key === 'a') all(row);
      else if (key === 'v' && clip) vote(clip);
      else if (/^[1-9]$/.test(key) && clips[key - 1]) {
        chain = false;
        go(r, key - 1);
        play(clips[key - 1], 0);
      } else if (clip && key === 'arrowright') go(r, k + 1);
      else if (clip && key === 'arrowleft') go(r, k - 1);
      else if (clip && key === 'arrowdown') go(r + 1, k);
      else if (clip && key === 'arrowup') go(r - 1, k);
    });
    if (listen.dataset.blind) conceal();
  });
  if (document.readyState === 'loading') document.addEventListener('DOMContentLoaded', begin); else begin();
})();
